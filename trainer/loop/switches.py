"""Files by which anybody who may write into the run folder steers a run that is not theirs to signal.

| file       | effect                                                                                         |
|------------|------------------------------------------------------------------------------------------------|
| `RUN/stop` | all ranks save at the next step and leave; the batch script does not requeue                   |
| `RUN/save` | all ranks save at the next step and go on                                                      |

The main process looks once a step, two calls to the file system, and removes a file when its wish is fulfilled; a start
that dies before leaves it to the next one.
"""

from pathlib import Path

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

    def fulfilled(self) -> None:
        """What was asked for is done, and on disk."""
        for path, asked in ((self._stop, self.stop), (self._save, self.save)):
            if asked:
                path.unlink(missing_ok=True)
        self.save = False
