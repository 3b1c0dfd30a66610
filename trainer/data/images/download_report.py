"""What became of the URLs of a download: counts that are checked, reasons of failure, a list for a second round."""

import json
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.data.images.tar_scan import damage_of, stats_path
from trainer.files import replacing
from trainer.formats.progress_bar import ProgressBar

_MAX_REASONS = 20
_GRACE = 600  # seconds beyond --tar-seconds in which pictures that have come are still resized and written
_NO_HTTP = "not an http or https URL"
# Asking again would give the same answer.
_PERMANENT = "HTTP Error (401|403|404|410|451)|X-Robots-Tag"


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """Counts of one part: URLs in its slice, pictures in its tars, tars that are (not) finished, failures by reason."""

    num_urls: int
    num_pictures: int
    num_tars: int
    num_unfinished: int
    reasons: dict[str, int]
    num_retry: int

    def lines(self) -> list[str]:
        """A table for a terminal."""
        share = self.num_pictures / max(1, self.num_urls)
        lines = [f"{self.num_pictures:>12}  pictures from {self.num_urls} URLs ({share:.1%}), {self.num_tars} tars"]
        ordered = Counter(self.reasons).most_common()
        lines += [f"{count:>12}  {reason}" for reason, count in ordered[:_MAX_REASONS]]
        if len(ordered) > _MAX_REASONS:
            lines.append(f"{sum(count for _, count in ordered[_MAX_REASONS:]):>12}  for other reasons")
        if self.num_unfinished:
            lines.append(f"{self.num_unfinished:>12}  tars are not finished")
        return lines


def total(reports: list[PartReport]) -> PartReport:
    """The sum over parts."""
    reasons = sum((Counter(report.reasons) for report in reports), Counter[str]())
    names = ("num_urls", "num_pictures", "num_tars", "num_unfinished", "num_retry")
    return PartReport(**{name: sum(getattr(r, name) for r in reports) for name in names}, reasons=dict(reasons))


def remove_damaged(folder: Path) -> list[str]:
    """Remove what img2dataset takes for finished and is not, so that it does it again; returns reasons.

    That is what is damaged, and all of a folder in which no URL gave a picture, as without a network.
    """
    found = []
    for tar in finished_tars(folder):
        reason = damage_of(tar, needs_stats=True) or _table_damage(tar)
        if reason:
            found.append(f"{tar.name}: {reason}")
            _remove(tar)
    whole = finished_tars(folder)
    if whole and not any(json.loads(stats_path(tar).read_text())["successes"] for tar in whole):
        found.append(f"{len(whole)} tars: no picture in any")
        for tar in whole:
            _remove(tar)
    return found


def _remove(tar: Path) -> None:
    for path in (stats_path(tar), tar, tar.with_suffix(".parquet")):
        path.unlink(missing_ok=True)


def _table_damage(tar: Path) -> str | None:
    try:
        rows = pq.read_metadata(tar.with_suffix(".parquet")).num_rows
        counted = json.loads(stats_path(tar).read_text())["count"]
        return None if rows == counted else "table with other rows than counted"
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return "table that cannot be read"


def finished_tars(folder: Path) -> list[Path]:
    """Tars with their counts, which are written last."""
    return [path.with_name(path.name.replace("_stats.json", ".tar")) for path in sorted(folder.glob("*_stats.json"))]


class DownloadProgress:
    """Says what is finished, and whether it is worth waiting: not when no tar has been finished for too long."""

    def __init__(self, folder: Path, num_tars: int, tar_seconds: int) -> None:
        self.folder, self.tar_seconds = folder, tar_seconds
        done = len(finished_tars(folder))
        self.bar = ProgressBar(desc=folder.name, total=num_tars, initial=done, unit="tar")
        self.num_done, self.last_tar = done, time.monotonic()

    def __enter__(self) -> "DownloadProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def __call__(self) -> bool:
        now, done = time.monotonic(), len(finished_tars(self.folder))
        size = sum(path.stat().st_size for path in self.folder.glob("*.tar"))
        self.bar.set_postfix_str(f"{size / 1e6:.0f} MB", refresh=False)
        self.bar.update(done - self.num_done)
        if done != self.num_done:
            self.num_done, self.last_tar = done, now
        if now - self.last_tar <= self.tar_seconds + _GRACE:
            return True
        print(f"{self.folder.name}: no tar was finished in {now - self.last_tar:.0f} s: img2dataset is ended")
        return False


def summarize(
    folder: Path, num_http: int, num_refused: int, num_tars: int, columns: list[str], failed: Path
) -> PartReport:
    """Count what a part's folder holds; write the URLs worth another try to `failed` under their old column names."""
    reasons: Counter[str] = Counter({_NO_HTTP: num_refused} if num_refused else {})
    retries, pictures, counted = [], 0, 0
    tars = [tar for tar in finished_tars(folder) if damage_of(tar, needs_stats=True) is None]
    for tar in tars:
        table = pq.read_table(tar.with_suffix(".parquet"))
        success = pc.equal(table.column("status"), "success")
        pictures += int(pc.sum(success).as_py() or 0)
        counted += table.num_rows
        bad = table.filter(pc.invert(success))
        reasons.update(_reason(message) for message in bad.column("error_message").to_pylist())
        permanent = pc.fill_null(pc.match_substring_regex(bad.column("error_message"), _PERMANENT), False)
        again = bad.filter(pc.and_(pc.equal(bad.column("status"), "failed_to_download"), pc.invert(permanent)))
        names = ["url", "caption", *columns[2:], "error_message"]
        retries.append(again.select(names).rename_columns([*columns, "error_message"]))
    num_retry = sum(table.num_rows for table in retries)
    if num_retry:
        failed.parent.mkdir(parents=True, exist_ok=True)
        with replacing(failed) as temporary:
            pq.write_table(pa.concat_tables(retries), temporary)
    else:
        failed.unlink(missing_ok=True)
    return PartReport(
        num_urls=num_http + num_refused,
        num_pictures=pictures,
        num_tars=len(tars),
        num_unfinished=num_tars - len(tars) or int(counted != num_http),
        reasons=dict(reasons),
        num_retry=num_retry,
    )


def _reason(message: Any) -> str:
    """One line, without what differs from URL to URL."""
    text = " ".join(str(message or "unknown").split())
    text = re.sub(r"0x[0-9a-f]+", "0x...", re.sub(r"'[^']*://[^']*'", "'URL'", text))
    return text if len(text) <= 100 else f"{text[:97]}..."
