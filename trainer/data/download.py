"""URL list -> image shards, with img2dataset: `python -m trainer.data.download urls.parquet --out DIR`.

    --parts N --part K    slice K of N of the list, into DIR/part-K; a job array needs nothing else
    --recipe RECIPE       pictures as large as this recipe needs them, --image-size, and no larger
    (the same command)    goes on where it stopped: finished tars stay, damaged ones are done again

DIR/part-K holds the tars; DIR/lists the slice and its settings, which must not change; DIR/reports the counts;
DIR/failed the URLs worth another try, itself a list of URLs; DIR/logs what img2dataset printed.
"""

import argparse
import fcntl
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.config import ConfigError, command_parser, interruptible, load_config, require
from trainer.data.images import img2dataset
from trainer.data.images.download_report import (
    DownloadProgress,
    PartReport,
    finished_tars,
    remove_damaged,
    summarize,
    total,
)
from trainer.data.images.img2dataset import DISTRIBUTORS, LIMITS, DownloadSettings
from trainer.data.images.url_list import UrlList, open_url_list, read_slice, split_http, table_digest
from trainer.files import check_writable, read_json, replacing, write_json

# Columns that img2dataset fills itself.
_RESERVED = (
    "key", "status", "error_message", "width", "height", "original_width", "original_height", "exif", "sha256", "md5",
    "sha512", "url", "caption",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Part:
    """Slice `number` of `count` of the list, and where its files are under the output folder."""

    out: Path
    number: int
    count: int

    @property
    def name(self) -> str:
        """Stem of all its files."""
        return f"part-{self.number:05d}"

    @property
    def folder(self) -> Path:
        """Where its tars go; nothing else may be in it: img2dataset takes any .json there for its own."""
        return self.out / self.name

    @property
    def record(self) -> Path:
        """The settings and the hash of the list that it was begun with, as JSON."""
        return self.out / "lists" / f"{self.name}-of-{self.count:05d}.json"

    @property
    def url_list(self) -> Path:
        """Its slice of the list."""
        return self.record.with_suffix(".parquet")

    @property
    def report(self) -> Path:
        """Its counts of pictures and failures, as JSON."""
        return self.out / "reports" / f"{self.name}.json"


def prepare(part: Part, columns: list[str], table: pa.Table, refused: int, settings: DownloadSettings) -> None:
    """Write the slice, or check that it and the settings are what the folder was begun with."""
    others = {path.stem.rpartition("-of-")[2] for path in part.record.parent.glob("part-*-of-*.json")}
    for other in others - {f"{part.count:05d}"}:
        raise ConfigError(f"{part.out} was begun with --parts {int(other)}, not {part.count}: name another --out")
    record = {
        "columns": columns,
        "settings": settings.of_content(),
        "num_http": table.num_rows,
        "num_refused": refused,
        "list_sha256": table_digest(table),
    }
    if part.record.is_file():
        # With another list or other settings img2dataset would skip rows without a word.
        remedy = "restore it, or name another --out"
        old = read_json(part.record, remedy)
        for name, value in record["settings"].items():
            was, flag = old.get("settings", {}).get(name), f"--{name.replace('_', '-')}"
            require(was == value, f"{flag} is {value} but {part.folder} was begun with {was}: {remedy}")
        same = all(old.get(name) == record[name] for name in ("columns", "num_http", "num_refused", "list_sha256"))
        require(same, f"the list of URLs is not the one that {part.folder} was begun with: {remedy}")
    with replacing(part.url_list) as temporary:
        pq.write_table(table, temporary)
    write_json(part.record, record)


def download_part(part: Part, urls: UrlList, settings: DownloadSettings, python: str) -> PartReport:
    """Download what is missing of one part and count what is there."""
    table, num_refused = split_http(read_slice(urls, part.number, part.count), urls.columns[0])
    num_http = table.num_rows
    require(
        num_http > 0 or num_refused == 0,
        f"column {urls.columns[0]} of {urls.files[0]}: none of the {num_refused} rows is an http or https URL: "
        "name another --url-column",
    )
    for name in ("lists", "logs", "reports"):
        (part.out / name).mkdir(parents=True, exist_ok=True)
    with (part.out / "lists" / f"{part.name}.lock").open("a") as lock:
        try:  # two downloads in one folder leave corrupt tars that look finished
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{part.folder} is being downloaded by another process: wait for it, or end it"
            ) from error
        prepare(part, urls.columns, table, num_refused, settings)
        part.folder.mkdir(exist_ok=True)
        for reason in remove_damaged(part.folder):
            print(f"{part.name}: {reason}: again")
        num_tars = -(-num_http // settings.samples_per_tar)
        done = len(finished_tars(part.folder))
        print(f"{part.name}: {num_http} URLs, {done} of {num_tars} tars finished")
        if done < num_tars:
            options = img2dataset.arguments(part.url_list, part.folder, settings, urls.columns)
            log = part.out / "logs" / f"{part.name}.log"
            with DownloadProgress(part.folder, num_tars, settings.tar_seconds) as progress:
                img2dataset.run(python, options, log, lock.fileno(), progress)
        failed = part.out / "failed" / f"{part.name}.parquet"
        report = summarize(part.folder, num_http, num_refused, num_tars, urls.columns, failed)
        write_json(part.report, asdict(report))
    return report


def _read_report(path: Path) -> PartReport:
    remedy = "delete it and run the download of that part again"
    try:
        return PartReport(**read_json(path, remedy))
    except TypeError as error:
        raise ConfigError(f"{path} is no report of a download: {remedy}") from error


def download(out: Path, urls: UrlList, settings: DownloadSettings, parts: list[int], count: int, python: str) -> bool:
    """Download parts one after the other and print their counts; returns whether all of them are finished."""
    whole = True
    for number in parts:
        part = Part(out=out, number=number, count=count)
        report = download_part(part, urls, settings, python)
        print("\n".join(report.lines()))
        if report.num_unfinished:
            whole = False
            print(f"{part.name} is not finished, see {part.out / 'logs' / part.name}.log: run the same command again")
        elif report.num_urls and not report.num_pictures:
            whole = False
            print(f"{part.name}: no URL gave a picture: mend the network or the list, and run the same command again")
    reports = sorted((out / "reports").glob("part-*.json"))
    if count > 1 and len(reports) == count:
        print("\n".join(["all parts", *total(list(map(_read_report, reports))).lines()]))
    if any((out / "failed").glob("*.parquet")):
        print(f"URLs worth another try: python -m trainer.data.download {out / 'failed'} --out {out}-again")
    return whole


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("trainer.data.download", __doc__)
    parser.add_argument(
        "urls", type=Path, help="list of URLs and captions: .parquet, .csv or .tsv, or a folder of them"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of image shards")
    parser.add_argument("--parts", type=int, default=1, help="slices that the list is cut into")
    parser.add_argument("--part", type=int, help="slice to download, from 0 (default: all, one after the other)")
    parser.add_argument("--url-column", help="default: url or image_url, in any case, whichever the list has")
    parser.add_argument("--caption-column", help="default: caption or text, in any case (LAION's TEXT)")
    parser.add_argument("--keep-columns", nargs="*", default=[], help="further columns to keep with each picture")
    parser.add_argument("--recipe", help="YAML recipe, or its name in trainer/configs: decides on --image-size")
    parser.add_argument("--python", default=sys.executable, help="interpreter of an environment with img2dataset")
    for name, value in asdict(DownloadSettings()).items():
        choices = {"encode_format": ("jpg", "png", "webp"), "distributor": DISTRIBUTORS}.get(name)
        default = None if name in ("encode_quality", "image_size") else value
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=default, choices=choices)
    return parser


def _image_size(given: int | None, recipe: str | None) -> tuple[int, str]:
    """To how many pixels the shorter side of larger pictures is reduced, and why."""
    if recipe is None:
        return given or DownloadSettings().image_size, "as given" if given else "the default: --recipe would choose"
    from trainer.data.images.decode import shorter_side  # numpy and Pillow take time, and --help needs neither

    data = load_config(recipe).data
    needed = shorter_side(data.picture_sizes())
    setting = "data.buckets" if data.buckets else f"data.image_size={data.image_size}"
    return given or needed, f"{'as given; ' if given else ''}{setting} of {recipe} needs {needed}"


def _check(args: argparse.Namespace) -> tuple[DownloadSettings, str]:
    """The settings, and why --image-size is what it is."""
    require(args.image_size is None or args.image_size >= 1, f"--image-size is {args.image_size}: use 1 or more")
    for name in ("parts", "samples_per_tar", "processes", "threads", "timeout", *LIMITS):
        require(getattr(args, name) >= 1, f"--{name.replace('_', '-')} is {getattr(args, name)}: use 1 or more")
    require(args.part is None or 0 <= args.part < args.parts, f"--part is {args.part}: use 0 to {args.parts - 1}")
    for column in args.keep_columns:
        require(column not in _RESERVED, f"--keep-columns {column}: img2dataset fills a column of that name itself")
    if args.encode_quality is None:
        args.encode_quality = 6 if args.encode_format == "png" else 95  # of png it is the effort of compression
    highest = 9 if args.encode_format == "png" else 100
    require(
        0 <= args.encode_quality <= highest,
        f"--encode-quality is {args.encode_quality}: use 0 to {highest} with --encode-format {args.encode_format}",
    )
    args.image_size, why = _image_size(args.image_size, args.recipe)
    return DownloadSettings(**{name: getattr(args, name) for name in asdict(DownloadSettings())}), why


@interruptible("tars that are finished are kept, and the same command goes on with the others")
def main(argv: list[str] | None = None) -> None:
    """Command line; exit code 1 if tars are missing, or a slice gave no picture."""
    args = _parser().parse_args(argv)
    settings, why = _check(args)
    check_writable(args.out, f"--out={args.out}")
    urls = open_url_list(args.urls, args.url_column, args.caption_column, tuple(args.keep_columns))
    print(f"URLs from column {urls.columns[0]}, captions from column {urls.columns[1]}")
    print(f"--image-size {settings.image_size}: {why}")
    img2dataset.check_environment(args.python, settings.distributor)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that img2dataset is ended too
    parts = list(range(args.parts)) if args.part is None else [args.part]
    if not download(args.out, urls, settings, parts, args.parts, args.python):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
