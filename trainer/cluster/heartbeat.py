"""Notices a process or node that is gone, and says which, where a collective would only wait.

A node without power does not even close its connections: a collective with it waits until its time-out. So each process
sends a line to the main one at intervals, over a connection and a thread of its own, and gets lines back. A process
that is silent for `TRAIN_SILENCE_SECONDS`, or whose connection ends without a farewell, is lost: all others log and
record its rank and node, and end after GRACE_SECONDS if the training thread has not ended them by its own error.
"""

import asyncio
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict

import torch

from trainer.cluster.incidents import Incident, record_incident
from trainer.cluster.watchdog import ARRIVAL_SECONDS, end_within
from trainer.distributed import World
from trainer.errors import ConfigError

SILENCE = "TRAIN_SILENCE_SECONDS"
DEFAULT_SILENCE, BEATS = 60.0, 6  # BEATS: intervals within a silence
GRACE_SECONDS = ARRIVAL_SECONDS + 30.0  # the way out after an error waits ARRIVAL_SECONDS for the other ranks
_BEAT, _BYE, _LOST = b".\n", b"bye\n", b"lost "
logger = logging.getLogger("ec_dit")


def end_soon(lost: Incident) -> None:
    """Log and record which process is lost; this one ends after a while if the training thread hangs."""
    end_within(GRACE_SECONDS, "lost peer")  # first: log and record may hang with the file system
    logger.error("%s: this process ends within %.0f s", lost.sentence, GRACE_SECONDS)
    record_incident(lost)


class Heartbeat:
    """Beats of one process on a thread of its own. `on_loss` is called there at the first loss, and only then."""

    def __init__(self, silence: float, on_loss: Callable[[Incident], None] = end_soon) -> None:
        self.silence, self.on_loss = silence, on_loss
        self.loop = asyncio.new_event_loop()
        self.ending = asyncio.Event()
        self.farewell, self.lost = True, False
        self.writers: set[asyncio.StreamWriter] = set()
        self.thread: threading.Thread | None = None

    def serve(self, listener: socket.socket) -> None:
        """As the main process: watch all that connect."""
        self._start(self._serve(listener))

    def join(self, rank: int, address: str, port: int) -> None:
        """As any other process: beat, and watch the main one."""
        self._start(self._join(rank, address, port))

    def close(self, *, farewell: bool) -> None:
        """End; without a farewell the others take this process for lost."""
        self.farewell = farewell
        self.loop.call_soon_threadsafe(self.ending.set)
        assert self.thread is not None
        self.thread.join()
        self.loop.close()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        run = self.loop.run_until_complete
        self.thread = threading.Thread(target=run, args=(self._run(work),), name="heartbeat", daemon=True)
        self.thread.start()

    async def _serve(self, listener: socket.socket) -> None:
        server = await asyncio.start_server(self._greet, sock=listener)
        await self.ending.wait()
        server.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        with suppress(asyncio.CancelledError):  # at the end; Python 3.11 would log it as an error of the handler
            rank, _, node = (await reader.readline()).decode().strip().partition(" ")
            await self._watch(int(rank or -1), node, reader, writer)
        self.writers.discard(writer)

    async def _join(self, rank: int, address: str, port: int) -> None:
        reader, writer = await asyncio.open_connection(address, port)
        self.writers.add(writer)
        writer.write(f"{rank} {socket.gethostname()}\n".encode())
        watching = asyncio.create_task(self._watch(0, address, reader, writer))
        await self.ending.wait()
        watching.cancel()

    async def _watch(self, rank: int, node: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the other end says goodbye or is lost."""
        beating, missed = asyncio.create_task(self._beat(writer)), 0
        try:
            while missed <= BEATS:
                try:
                    line = await asyncio.wait_for(reader.readline(), self.silence / BEATS)
                except TimeoutError:
                    missed += 1  # counted, not timed: a job that was suspended as a whole has missed one beat
                    continue
                missed = 0
                if line == _BYE:
                    return
                if line.startswith(_LOST):
                    self._lose(Incident(**json.loads(line.removeprefix(_LOST))))
                elif not line:
                    raise ConnectionResetError
            self._lose(_lost(rank, node, "silent", f"silent for {self.silence:.0f} s"))
        except ConnectionError:  # also a reset: it ended with beats unread
            self._lose(_lost(rank, node, "ended", "its process has ended"))
        except OSError as error:  # no route to it
            self._lose(_lost(rank, node, "unreachable", f"{error.strerror}"))
        finally:
            beating.cancel()

    async def _beat(self, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            writer.write(_BEAT)
            await asyncio.sleep(self.silence / BEATS)

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
        await work
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


def _lost(rank: int, node: str, reason: str, why: str) -> Incident:
    sentence = f"rank {rank} on node {node} is lost ({why})"
    return Incident(kind="lost_peer", rank=rank, node=node, reason=reason, sentence=sentence)


@contextmanager
def watch_peers(world: World) -> Iterator[None]:
    """Within the block, all processes watch each other. Collective at its begin; the process group must exist."""
    if world.size == 1:
        yield
        return
    heartbeat = Heartbeat(float(os.environ.get(SILENCE) or DEFAULT_SILENCE))
    address, port = os.environ["MASTER_ADDR"], [0]
    if world.is_main:
        family = socket.getaddrinfo(address, None)[0][0]
        listener = socket.create_server(("", 0), family=family, backlog=world.size)
        port[0] = listener.getsockname()[1]
        heartbeat.serve(listener)
    torch.distributed.broadcast_object_list(port, src=0)
    if not world.is_main:
        heartbeat.join(world.rank, address, port[0])
    try:
        yield
    except BaseException as error:
        heartbeat.close(farewell=isinstance(error, ConfigError))  # which all ranks raise together
        raise
    heartbeat.close(farewell=True)
