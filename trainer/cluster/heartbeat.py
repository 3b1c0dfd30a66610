"""Notices a process or node that is gone or hangs, and says which, where a collective would only wait.

A node without power does not even close its connections: a collective with it waits until its time-out. So each process
sends a line to the main one at intervals, over a connection and a thread of its own, and gets lines back. A process
that is silent for `TRAIN_SILENCE_SECONDS`, or whose connection ends without a farewell, is lost. The lines say how far
each process has come; when one has not got on for too long, the main process judges who is behind (progress.py). All
log and record rank and node, write their stacks, and end if the training thread has not ended them by its own error.
"""

import asyncio
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from trainer.cluster.incidents import Incident, record_incident
from trainer.cluster.outcome import Outcome, Recorder
from trainer.cluster.progress import BEATS_PER_LIMIT, Beat, Progress, judge
from trainer.cluster.stacks import stacks_file, write_stacks
from trainer.cluster.watchdog import ARRIVAL_SECONDS, end_within
from trainer.distributed import World
from trainer.errors import ConfigError

SILENCE = "TRAIN_SILENCE_SECONDS"
DEFAULT_SILENCE, BEATS = 60.0, 6  # BEATS: intervals within a silence
GRACE_SECONDS = ARRIVAL_SECONDS + 30.0  # the way out after an error waits ARRIVAL_SECONDS for the other ranks
QUIET = 3  # beats missed in a row by which a process counts as stopped when somebody hangs
HANG_GRACE_SECONDS = 10.0  # no rank can get anywhere without one that does nothing; this is for writing stacks
_BYE, _LOST = b"bye\n", b"lost "
logger = logging.getLogger("ec_dit")


def end_soon(lost: Incident, *, rank: int = -1, stacks: Path | None = None) -> None:
    """Log and record which process is lost; this one, `rank`, ends after a while if the training thread hangs."""
    hopeless = lost.reason in ("silent", "hung")
    seconds = min(GRACE_SECONDS, HANG_GRACE_SECONDS) if hopeless else GRACE_SECONDS
    end_within(seconds, "lost peer")  # first: log and record may hang with the file system
    record_incident(lost)
    logger.error("%s: this process ends within %.0f s", lost.sentence, seconds)
    if hopeless and stacks is not None:
        logger.error("stacks: %s", stacks)
        with suppress(OSError):  # a full disk may be what went wrong; the log says the same, and at the end all stacks
            Recorder(rank=rank).record(Outcome(kind="failed", reason=lost.sentence))  # the training thread never will
            write_stacks(stacks, lost)


class Heartbeat:
    """Beats of one process on a thread of its own. `on_loss` is called there at the first loss, and only then."""

    def __init__(
        self, silence: float, on_loss: Callable[[Incident], None] = end_soon, progress: Progress | None = None
    ) -> None:
        self.silence, self.on_loss, self.progress = silence, on_loss, progress or Progress()
        self.interval = min(silence / BEATS, (self.progress.hang_seconds or silence) / BEATS_PER_LIMIT)
        self.loop = asyncio.new_event_loop()
        self.ending = asyncio.Event()
        self.farewell, self.lost, self.rank = True, False, 0
        self.writers: set[asyncio.StreamWriter] = set()
        self.beating: set[asyncio.StreamWriter] = set()
        self.heard: dict[int, Beat] = {}  # of the others
        self.missed: dict[int, int] = {}  # beats in a row
        self.thread: threading.Thread | None = None

    def serve(self, listener: socket.socket) -> None:
        """As the main process: watch all that connect."""
        self._start(self._serve(listener))

    def join(self, rank: int, address: str, port: int) -> None:
        """As any other process: beat, and watch the main one."""
        self.rank = rank
        self._start(self._join(address, port))

    def watch_self(self) -> None:
        """As the only process: just see whether it gets on."""
        self._start(self._alone())

    def close(self, *, farewell: bool) -> None:
        """End; without a farewell the others take this process for lost."""
        self.farewell = farewell
        self.loop.call_soon_threadsafe(self.ending.set)
        assert self.thread is not None
        self.thread.join()
        self.loop.close()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        self.mine = self.progress.look(self.rank, 0.0)
        run = self.loop.run_until_complete
        self.thread = threading.Thread(target=run, args=(self._run(work),), name="heartbeat", daemon=True)
        self.thread.start()

    async def _serve(self, listener: socket.socket) -> None:
        server = await asyncio.start_server(self._greet, sock=listener)
        await self.ending.wait()
        server.close()

    async def _alone(self) -> None:
        await self.ending.wait()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        with suppress(asyncio.CancelledError):  # at the end; Python 3.11 would log it as an error of the handler
            await self._watch(-1, "unknown", reader, writer)
        self.writers.discard(writer)

    async def _join(self, address: str, port: int) -> None:
        reader, writer = await asyncio.open_connection(address, port)
        self.writers.add(writer)
        watching = asyncio.create_task(self._watch(0, address, reader, writer))
        await self.ending.wait()
        watching.cancel()

    async def _watch(self, rank: int, node: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the other end says goodbye or is lost; its rank, node and process are in its beats."""
        pid, missed, most = 0, 0, round(self.silence / self.interval)
        writer.write(_line(self.mine))
        self.beating.add(writer)
        try:
            while missed <= most:
                try:
                    line = await asyncio.wait_for(reader.readline(), self.interval)
                except TimeoutError:
                    missed += 1  # counted, not timed: a job that was suspended as a whole has missed one beat
                    self.missed[rank] = missed
                    continue
                missed = 0
                if line == _BYE:
                    if rank in self.heard:  # who has left is ahead of all
                        self.heard[rank] = replace(
                            self.heard[rank], phase="end", collectives=sys.maxsize, overdue=False
                        )
                    self.missed[rank] = 0
                    return
                if line.startswith(_LOST):
                    self._lose(Incident(**json.loads(line.removeprefix(_LOST))))
                elif not line:
                    raise ConnectionResetError
                else:
                    beat = Beat(**json.loads(line))
                    rank, node, pid = beat.rank, beat.node, beat.pid
                    self.heard[rank], self.missed[rank] = beat, 0
            self._lose(_lost(rank, node, "silent", f"silent for {self.silence:.0f} s", pid))
        except ConnectionError:  # also a reset: it ended with beats unread
            self._lose(_lost(rank, node, "ended", "its process has ended", pid))
        except OSError as error:  # no route to it
            self._lose(_lost(rank, node, "unreachable", f"{error.strerror}", pid))
        finally:
            self.beating.discard(writer)

    async def _tick(self) -> None:
        """Beat; the main process, which hears all others, judges as well. When it is mute, each other one does."""
        while True:
            self.mine = self.progress.look(self.rank, self.interval)
            for writer in self.beating:
                if not writer.is_closing():
                    writer.write(_line(self.mine))
            if self.rank == 0 or self.missed.get(0, 0) >= QUIET:
                quiet = [rank for rank, missed in self.missed.items() if missed >= QUIET]
                if found := judge([self.mine, *self.heard.values()], quiet, self.interval):
                    self._lose(found)
            await asyncio.sleep(self.interval)

    def _lose(self, lost: Incident) -> None:
        """Tell this process, and from the main process all others."""
        if self.lost:
            return
        self.lost = True
        for writer in self.writers:
            writer.write(_LOST + json.dumps(asdict(lost)).encode() + b"\n")
        self.on_loss(lost)

    async def _run(self, work: Coroutine[None, None, None]) -> None:
        """Do the work, say goodbye, leave nothing behind in the loop."""
        ticking, working = asyncio.create_task(self._tick()), asyncio.ensure_future(work)
        await asyncio.wait((ticking, working), return_when=asyncio.FIRST_COMPLETED)
        if ticking.done():
            ticking.result()  # an error: this thread ends with it, and the others hear no more
        writers = list(self.writers)
        for writer in writers:
            if self.farewell:
                writer.write(_BYE)
            writer.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        closing = asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)
        await asyncio.wait([closing], timeout=1)
        closing.cancel()


def _line(beat: Beat) -> bytes:
    return json.dumps(asdict(beat)).encode() + b"\n"


def _lost(rank: int, node: str, reason: str, why: str, pid: int = 0) -> Incident:
    sentence = f"rank {rank} on node {node} is lost ({why})"
    return Incident(kind="lost_peer", rank=rank, node=node, pid=pid, reason=reason, sentence=sentence)


@contextmanager
def watch_peers(world: World, progress: Progress, run_dir: Path) -> Iterator[None]:
    """Within the block, all processes watch each other. Collective at its begin; the process group must exist."""
    on_loss = partial(end_soon, rank=world.rank, stacks=stacks_file(run_dir, world.rank))
    heartbeat = Heartbeat(float(os.environ.get(SILENCE) or DEFAULT_SILENCE), on_loss, progress)
    if world.size == 1:
        heartbeat.watch_self()
    else:
        _connect(heartbeat, world)
    try:
        yield
    except BaseException as error:
        heartbeat.close(farewell=isinstance(error, ConfigError))  # which all ranks raise together
        raise
    heartbeat.close(farewell=True)


def _connect(heartbeat: Heartbeat, world: World) -> None:
    address, port = os.environ["MASTER_ADDR"], [0]
    if world.is_main:
        family = socket.getaddrinfo(address, None)[0][0]
        listener = socket.create_server(("", 0), family=family, backlog=world.size)
        port[0] = listener.getsockname()[1]
        heartbeat.serve(listener)
    torch.distributed.broadcast_object_list(port, src=0)
    if not world.is_main:
        heartbeat.join(world.rank, address, port[0])
