"""How far long work is: a bar on a terminal, a line now and then in a log."""

import io
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from tqdm import tqdm

FIRST_LINE, LONGEST_PAUSE = 10.0, 60.0  # seconds in a log: to the first line, and at most between two
_LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {rate_fmt}, {elapsed} gone, {remaining} to go{postfix}"


class ProgressBar(tqdm):  # type: ignore[misc]
    """tqdm's bar where stderr is a terminal. Elsewhere lines with the same facts: the first after `FIRST_LINE` seconds,
    then ever more seldom, and one at the end; work that is done sooner says nothing.

    `shown` is False on all processes but one. Without `leave` a terminal's bar is wiped out at the end.
    """

    def __init__(
        self, iterable: Iterable[Any] | None = None, desc: str = "", total: int | None = None, *, unit: str = "it",
        shown: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        self.mininterval: float
        self.log: TextIO | None = None if sys.stderr.isatty() else sys.stderr
        if self.log is not None:
            # What tqdm writes itself is for a terminal: `display` writes the lines.
            options |= {"file": io.StringIO(), "delay": FIRST_LINE, "mininterval": FIRST_LINE, "miniters": 0,
                        "bar_format": _LINE, "leave": True}  # fmt: skip
        super().__init__(iterable, desc, total, unit=unit, disable=not shown, **options)

    def __iter__(self) -> Iterator[Any]:
        if self.log is None or self.disable:
            yield from super().__iter__()
            return
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Show how far it is, as tqdm asks for it."""
        if self.log is None:
            return super().display(msg, pos)
        if self.last_print_n == self.n == self.total:  # said already
            return True
        self.mininterval = min(2 * self.mininterval, LONGEST_PAUSE)
        print(" ".join(str(self).split()), file=self.log, flush=True)
        return True


class BesideBars(logging.StreamHandler[TextIO]):
    """Writes records to a terminal without tearing the bars that it shows."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record while the bars are away."""
        with ProgressBar.external_write_mode(file=self.stream):
            super().emit(record)
