"""Files by which anybody who may write into the run folder steers a run that is not theirs to signal.

| file       | effect                                                                                         |
|------------|------------------------------------------------------------------------------------------------|
| `RUN/stop` | all ranks save at the next step and leave, and no start begins until somebody removes the file  |
| `RUN/save` | all ranks save at the next step and go on; the file is gone when that is on disk               |

The main process looks once a step, two calls to the file system. A stop is for all jobs that continue the run: the next
link of a chain, or a job in the queue, must not take up again what somebody wants to have ended.
"""

from pathlib import Path

from trainer.errors import require

STOP_NAME, SAVE_NAME = "stop", "save"


class Switches:
    """The files of one run; on all but the main process none is ever there."""

    def __init__(self, run_dir: Path, *, is_main: bool) -> None:
        self._stop, self._save, self._is_main = run_dir / STOP_NAME, run_dir / SAVE_NAME, is_main
        self.stop = self.save = False

    def look(self) -> None:
        """See what is asked for now."""
        if self._is_main:
            self.stop, self.save = self.stop or self._stop.exists(), self.save or self._save.exists()

    def saved(self) -> None:
        """What was asked for is on disk."""
        if self.save:
            self._save.unlink(missing_ok=True)
        self.save = False


def check_not_stopped(run_dir: Path) -> None:
    """ConfigError while the run is asked to stop."""
    path = run_dir / STOP_NAME
    require(not path.exists(), f"{path} asks this run to stop: remove the file, then start it again")
