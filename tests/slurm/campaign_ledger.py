"""The campaign's file: a line for each event, for each run that was compared, and for whatever else was found."""

import json
import time
from pathlib import Path
from threading import Lock
from typing import Any


class Ledger:
    """The file of events, and how many are still wanted."""

    def __init__(self, path: Path, events: int, minutes: float) -> None:
        self.path, self.events, self.end, self.lock = path, events, time.monotonic() + 60 * minutes, Lock()
        self.records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.under_way = 0

    def reserve(self) -> bool:
        """Whether one more event is wanted."""
        with self.lock:
            done = sum("kind" in record for record in self.records)
            wanted = done + self.under_way < self.events and time.monotonic() < self.end
            self.under_way += wanted
            return wanted

    def add(self, record: dict[str, Any], *, reserved: bool = True) -> None:
        """Append; what has a `finding` is said at once."""
        with self.lock:
            self.under_way -= reserved
            self.records.append(record)
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)

    def release(self) -> None:
        """The reserved one did not happen."""
        with self.lock:
            self.under_way -= 1

    def next(self, slot: str) -> int:
        """Number of a slot's next draw."""
        return 1 + max((r["number"] for r in self.records if r.get("slot") == slot and "number" in r), default=-1)

    def table(self) -> str:
        """One line per kind of event."""
        rows = [("event", "number", "recovered", "mean s", "findings")]
        events = [record for record in self.records if "kind" in record]
        for kind in sorted({record["kind"] for record in events}):
            mine = [record for record in events if record["kind"] == kind]
            seconds = [record["seconds"] for record in mine if record["recovered"]]
            mean = f"{sum(seconds) / len(seconds):.0f}" if seconds else "-"
            findings = sum(bool(record["finding"]) for record in mine)
            rows.append((kind, str(len(mine)), str(len(seconds)), mean, str(findings)))
        rows.append(("all", str(len(events)), str(sum(r["recovered"] for r in events)), "",
                     str(sum(bool(r["finding"]) for r in self.records))))  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        runs = sum("verified" in record for record in self.records)
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join([*lines, f"{runs} runs compared with unbroken ones"])
