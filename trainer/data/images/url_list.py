"""A list of URLs with captions, in parquet, CSV or TSV files, cut into slices by row number.

Every task of a job array cuts its own slice, so nobody has to prepare or coordinate anything. Of parquet only the
row groups of the slice are read; CSV and TSV are read to their end to know their length. In CSV a field may stand in
quotes, with line ends in it and quotes doubled; in TSV only if the header does, too: captions may begin with one.
"""

import csv
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.config import ConfigError, require

_SUFFIXES = (".parquet", ".csv", ".tsv")
# Names of columns in public lists (LAION: URL and TEXT, COYO and DataComp: url and text), in any case.
URL_COLUMNS, CAPTION_COLUMNS = ("url", "image_url"), ("caption", "text")
_HTTP = "^https?://."  # with `file:` img2dataset would read local files into the data
_BATCH_ROWS = 1 << 16
_MAX_FIELD = 1 << 24  # characters; the csv module's own limit is 131072
_QUOTED = re.compile(r'"[^"]*(""[^"]*)+"')  # as a writer leaves a field whose own quotes it doubled


@dataclass(frozen=True)
class UrlList:
    """The files of a list in the order of names, and the columns that are read: URL, caption, further ones."""

    files: list[Path]
    columns: list[str]


def open_url_list(
    path: Path, url_column: str | None, caption_column: str | None, extra_columns: tuple[str, ...] = ()
) -> UrlList:
    """One file or a folder of them; ConfigError if there is none or a column is missing.

    Columns that are not named are found by the names that public lists give them.
    """
    with _sentences(path):
        path.stat()
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES) if path.is_dir() else [path]
    require(
        bool(files) and all(file.suffix.lower() in _SUFFIXES for file in files),
        f"{path} is no list of URLs: name a .parquet, .csv or .tsv file, or a folder of them",
    )
    names = _schema(files[0]).names
    columns = [
        url_column or _usual(files[0], names, URL_COLUMNS, "--url-column"),
        caption_column or _usual(files[0], names, CAPTION_COLUMNS, "--caption-column"),
        *extra_columns,
    ]
    twice = next((column for column in columns if columns.count(column) > 1), None)
    require(twice is None, f"column {twice} is named for two purposes: URL, caption and columns to keep must differ")
    for file in files:
        schema = _schema(file)
        for column in columns:
            number = schema.names.count(column)
            require(number > 0, f"{file} has no column {column}: it has {', '.join(schema.names)}")
            require(number == 1, f"{file} has {number} columns named {column}: rename the others")
            kind = schema.field(column).type
            require(not pa.types.is_nested(kind), f"column {column} of {file} holds {kind}: it must hold one text each")
    return UrlList(files, columns)


def _usual(file: Path, names: list[str], usual: tuple[str, ...], flag: str) -> str:
    """The column of the first usual name that there is, in any case."""
    found = next((fits for word in usual if (fits := [name for name in names if name.lower() == word])), [])
    how_many = f"{len(found) or 'no'} columns named {' or '.join(usual)}"
    require(len(set(found)) == 1, f"{file} has {how_many}: name one by {flag}, of {', '.join(names)}")
    return found[0]


@contextmanager
def _sentences(file: Path) -> Iterator[None]:
    """Errors of reading a file as ConfigError."""
    try:
        yield
    except FileNotFoundError as error:
        raise ConfigError(f"{file} is not there: name a .parquet, .csv or .tsv file, or a folder of them") from error
    except (pa.ArrowException, OSError, UnicodeError, csv.Error) as error:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        hint = ": write it as UTF-8" if isinstance(error, UnicodeError) else ""
        raise ConfigError(f"{file} cannot be read as {file.suffix or 'a folder'} ({reason}){hint}") from error


def _schema(file: Path) -> pa.Schema:
    with _sentences(file):
        if file.suffix.lower() == ".parquet":
            return pq.read_schema(file)
        with file.open(encoding="utf-8-sig", newline="") as opened:
            return pa.schema([(name, pa.string()) for name in next(_records(file, opened))])


def _records(file: Path, opened: TextIO) -> Iterator[list[str]]:
    """The header and rows of CSV or TSV, each checked for its number of fields."""
    csv.field_size_limit(_MAX_FIELD)
    first = opened.readline()
    require(bool(first.strip()), f"{file} is empty: its first line must name the columns")
    opened.seek(0)
    plain = file.suffix.lower() == ".tsv" and not first.startswith('"')
    reader = csv.reader(
        opened,
        delimiter="\t" if file.suffix.lower() == ".tsv" else ",",
        quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL,
        strict=True,
    )
    width = 0
    try:
        for row in reader:
            width = width or len(row)
            if len(row) == width and not (plain and '""' in "\t".join(row) and any(map(_QUOTED.fullmatch, row))):
                yield row
            elif row:
                raise ConfigError(_bad_row(file, reader.line_num, row, width))
    except csv.Error as error:
        raise ConfigError(f"{file}, line {reader.line_num}: {error}: mend the quotes of the rows before it") from error


def _bad_row(file: Path, line: int, row: list[str], width: int) -> str:
    if len(row) != width:
        return f"{file}, line {line}: {len(row)} fields where the header has {width}: mend the line"
    return (
        f"{file}, line {line}: {next(filter(_QUOTED.fullmatch, row))} has doubled quotes, but no quotes are read in a "
        ".tsv whose header has none: write the header in quotes, too, or the list as .csv or .parquet"
    )


def _pieces(file: Path, columns: list[str]) -> Iterator[tuple[int, Callable[[], pa.Table]]]:
    """Of each row group of parquet or batch of text: how many rows it has, and what gives (or first reads) them."""
    if file.suffix.lower() == ".parquet":
        with pq.ParquetFile(file) as parquet:
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                yield rows, partial(parquet.read_row_group, group, columns=columns)
        return
    with file.open(encoding="utf-8-sig", newline="") as opened:
        records = _records(file, opened)
        header = next(records)
        places = [header.index(column) for column in columns]
        while batch := list(islice(records, _BATCH_ROWS)):
            # Nothing but an empty field is null: a caption may well be "NA".
            values = [[row[place] or None for row in batch] for place in places]
            yield len(batch), partial(pa.table, dict(zip(columns, values, strict=True)))


def read_slice(urls: UrlList, part: int, num_parts: int) -> pa.Table:
    """Rows [total * part / num_parts, total * (part + 1) / num_parts) of the list, all columns as strings."""
    counts = []
    for file in urls.files:
        with _sentences(file):
            counts.append(sum(rows for rows, _ in _pieces(file, urls.columns)))
    total = sum(counts)
    require(total > 0, f"{', '.join(map(str, urls.files))}: no row below the header, so there is nothing to download")
    first, last = total * part // num_parts, total * (part + 1) // num_parts
    schema = pa.schema([(name, pa.string()) for name in urls.columns])
    found, end = [schema.empty_table()], 0
    for file, count in zip(urls.files, counts, strict=True):
        start, end = end, end + count
        if start >= last or end <= first:
            continue
        with _sentences(file):
            for rows, read in _pieces(file, urls.columns):
                low, high = max(0, first - start), min(rows, last - start)
                if low < high:
                    found.append(read().select(urls.columns).slice(low, high - low).cast(schema))
                    found[-1].validate(full=True)  # parquet may hold strings that are not UTF-8
                start += rows
    table = pa.concat_tables(found).combine_chunks()
    require(table.num_rows == last - first, f"{urls.files[0].parent}: the list changed while it was read: start again")
    return table


def split_http(table: pa.Table, url_column: str) -> tuple[pa.Table, int]:
    """The rows whose URL is http or https, and how many are not."""
    kept = pc.fill_null(pc.match_substring_regex(table.column(url_column), _HTTP, ignore_case=True), False)
    http = table.filter(kept)
    return http, table.num_rows - http.num_rows


def table_digest(table: pa.Table) -> str:
    """Hash of a table's names and values, whatever its chunks."""
    digest = hashlib.sha256("\0".join(table.column_names).encode())
    for column in table.columns:
        for start in range(0, len(column), 1 << 16):
            values = column.slice(start, 1 << 16).to_pylist()
            digest.update("\0".join("\1" if value is None else value for value in values).encode() + b"\0")
        digest.update(b"\2")
    return digest.hexdigest()[:16]
