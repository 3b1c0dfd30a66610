"""One job per run folder: a lease on `RUN/run.lock` that the main process holds.

The lease is a marker file that is created exclusively and renewed in the background (`filelock.SoftFileLease`).
It needs no `flock`, which network file systems may lack or keep to one host. Who may take it over:

| the holder                                          | a second job                                         |
|-----------------------------------------------------|------------------------------------------------------|
| runs on this host                                   | is refused at once                                   |
| died on this host                                   | takes the lease at once                              |
| is an earlier start of the same Slurm job (requeue) | takes the lease at once, begins after two renewals   |
| anything else (other host or container, a zombie)   | watches: is refused when the lease is renewed, takes |
|                                                     | it after LEASE_SECONDS without a renewal             |

Slurm requeues a job from a node that it cannot reach, on which the earlier start may go on until its second renewal,
at which filelock tells it that the folder is not its own: so long the later one waits.
The watcher measures time on its own clock, so the hosts' clocks need not agree. A holder that could not renew its lease
in time (its file system hung) and lost it to another job learns so from `RunLock.lost`. The renewing thread is
filelock's own: see trainer/cluster/watchdog.py for why it shares none with the others that watch a run.
"""

import json
import logging
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import SoftFileLease, Timeout

from trainer.cluster.node import node_name
from trainer.errors import ConfigError, writing
from trainer.files import replacing

LEASE_SECONDS, RENEWALS_PER_LEASE, RENEWALS_TO_LEARN = 60.0, 6, 2.25
LOCK_NAME, HOLDER_NAME = "run.lock", "run.lock.json"
logger = logging.getLogger("ec_dit")


class LockLostError(RuntimeError):
    """Another job took the run folder over: this one must not write there any more."""


def _namespace() -> str:
    """Host and process-id namespace, within which a process number names one process: also outside of Slurm."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a run folder. `restart` counts the starts of one Slurm job, 0 the first."""

    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=node_name)
    namespace: str = field(default_factory=_namespace)
    job_id: str = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID", ""))
    restart: int = field(default_factory=lambda: int(os.environ.get("SLURM_RESTART_COUNT") or 0))
    since: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S %z"))

    def describe(self) -> str:
        """For a sentence."""
        job = f", Slurm job {self.job_id}" if self.job_id else ""
        return f"process {self.pid} on {self.host}{job} since {self.since}"

    def is_requeued_as(self, other: "Holder") -> bool:
        """Whether `other` is a later start of the same Slurm job: Slurm has ended this one."""
        return bool(self.job_id) and self.job_id == other.job_id and self.restart < other.restart

    def is_running_here(self) -> bool:
        """Whether this process runs on this host, as far as /proc tells; a zombie does not run."""
        if self.namespace != _namespace():
            return False
        with suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
        return not Path("/proc/self/stat").exists()


class RunLock:
    """The lease on a run folder. `lease_seconds` must be the same for all who contend for one."""

    def __init__(self, run_dir: Path, lease_seconds: float = LEASE_SECONDS) -> None:
        self.run_dir, self.lease_seconds = run_dir, lease_seconds
        self.marker, self.record = run_dir / LOCK_NAME, run_dir / HOLDER_NAME
        self.lease = SoftFileLease(
            self.marker, lease_duration=lease_seconds, heartbeat_interval=lease_seconds / RENEWALS_PER_LEASE
        )

    @property
    def lost(self) -> bool:
        """Whether another job has taken the folder over from this one."""
        return self.lease.compromise is not None

    def loss(self) -> Exception:
        """Why the run must end that lost its lease: the folder was removed, or may be another job's."""
        if not self.run_dir.exists():
            return ConfigError(f"run_dir={self.run_dir} was removed while the run was going on")
        removed = self.lease.compromise is not None and self.lease.compromise.reason == "marker-missing"
        how = f"lost its {LOCK_NAME} and may have been" if removed else "was"
        return LockLostError(f"run_dir={self.run_dir} {how} taken over by another job")

    def acquire(self) -> None:
        """Take the lease, or raise ConfigError naming its holder; creates the folder."""
        with writing(f"run_dir={self.run_dir}"):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._acquire()
            with replacing(self.record) as temporary:
                temporary.write_text(json.dumps(asdict(Holder())) + "\n")

    def release(self) -> None:
        """Give the lease back; does nothing on a process that does not hold it."""
        if self.lease.is_locked and not self.lost:
            self.record.unlink(missing_ok=True)
        self.lease.release()

    def _acquire(self) -> None:
        if self._try_acquire():
            return
        holder = self.holder()
        if holder is not None and holder.is_requeued_as(Holder()):
            logger.warning("taking over %s from %s: this is its requeued job", self.run_dir, holder.describe())
            self.lease.force_break()
            if self._try_acquire():
                time.sleep(RENEWALS_TO_LEARN * self.lease_seconds / RENEWALS_PER_LEASE)
        elif holder is not None and holder.is_running_here():
            raise self._refusal(holder)
        elif not self._watch():
            raise self._refusal(self.holder())
        if not self.lease.is_locked and not self._try_acquire():
            raise self._refusal(self.holder())

    def _try_acquire(self) -> bool:
        with suppress(Timeout):
            self.lease.acquire(blocking=False)
        return self.lease.is_locked

    def _watch(self) -> bool:
        """Wait for a sign of life, or take the lease when none comes."""
        logger.warning(
            "%s is locked: watching for up to %.0f s whether its job lives", self.run_dir, self.lease_seconds
        )
        first = self._renewal()
        with suppress(Timeout):
            self.lease.acquire(
                timeout=2 * self.lease_seconds,
                poll_interval=self.lease_seconds / 60,
                cancel_check=lambda: self._renewal() not in (first, None),
            )
        return self.lease.is_locked

    def _renewal(self) -> tuple[int, int] | None:
        """Changes with each renewal. Opened, not just asked for: NFS then asks its server."""
        with suppress(OSError), self.marker.open("rb") as file:
            status = os.fstat(file.fileno())
            return status.st_ino, status.st_mtime_ns
        return None

    def holder(self) -> Holder | None:
        """The holder's own record; None when it is missing or older than the lease."""
        with suppress(OSError, ValueError, TypeError):
            holder = Holder(**json.loads(self.record.read_text()))
            return holder if holder.pid == self.lease.pid else None
        return None

    def _refusal(self, holder: Holder | None) -> ConfigError:
        who = holder.describe() if holder else f"process {self.lease.pid}"
        return ConfigError(
            f"run_dir={self.run_dir} is in use by {who}: wait for its end, stop it, or choose another run_dir"
        )
