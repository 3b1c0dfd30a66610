"""A list of URLs with captions, in parquet, CSV or TSV files, cut into slices by row number.

Every task of a job array cuts its own slice, so nobody has to prepare or coordinate anything. Of parquet only the
row groups of the slice are read; CSV and TSV are read to their end to know their length.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from trainer.config import ConfigError, require

_SUFFIXES = (".parquet", ".csv", ".tsv")
_HTTP = "^https?://."  # with `file:` img2dataset would read local files into the data


@dataclass(frozen=True)
class UrlList:
    """The files of a list in the order of names, and the columns that are read: URL, caption, further ones."""

    files: list[Path]
    columns: list[str]


def open_url_list(path: Path, url_column: str, caption_column: str, extra_columns: tuple[str, ...] = ()) -> UrlList:
    """One file or a folder of them; ConfigError if there is none or a column is missing."""
    require(path.exists(), f"{path} is not there: name a .parquet, .csv or .tsv file, or a folder of them")
    files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES) if path.is_dir() else [path]
    require(
        bool(files) and all(file.suffix in _SUFFIXES for file in files),
        f"{path} is no list of URLs: name a .parquet, .csv or .tsv file, or a folder of them",
    )
    columns = [url_column, caption_column, *extra_columns]
    for file in files:
        names = _column_names(file)
        for column in columns:
            require(column in names, f"{file} has no column {column}: it has {', '.join(names)}")
    return UrlList(files, columns)


def _column_names(file: Path) -> list[str]:
    try:
        if file.suffix == ".parquet":
            return list(pq.read_schema(file).names)
        with pa_csv.open_csv(file, parse_options=_dialect(file)) as reader:
            return list(reader.schema.names)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{file} cannot be read as {file.suffix}: {str(error).splitlines()[0]}") from error


def _dialect(file: Path) -> pa_csv.ParseOptions:
    return pa_csv.ParseOptions(delimiter="\t" if file.suffix == ".tsv" else ",", newlines_in_values=True)


def _pieces(file: Path, columns: list[str]) -> Iterator[tuple[int, Callable[[], pa.Table]]]:
    """Of each row group of parquet or batch of text: how many rows it has, and what gives (or first reads) them."""
    if file.suffix == ".parquet":
        parquet = pq.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            yield parquet.metadata.row_group(group).num_rows, partial(parquet.read_row_group, group, columns=columns)
        return
    types = dict.fromkeys(columns, pa.string())
    # Nothing but an empty field is null: a caption may well be "NA".
    convert = pa_csv.ConvertOptions(
        include_columns=columns, column_types=types, null_values=[""], strings_can_be_null=True
    )
    with pa_csv.open_csv(file, parse_options=_dialect(file), convert_options=convert) as reader:
        for batch in reader:
            yield batch.num_rows, partial(pa.Table.from_batches, [batch])


def read_slice(urls: UrlList, part: int, num_parts: int) -> pa.Table:
    """Rows [total * part / num_parts, total * (part + 1) / num_parts) of the list, all columns as strings."""
    counts = [sum(rows for rows, _ in _pieces(file, urls.columns)) for file in urls.files]
    total = sum(counts)
    first, last = total * part // num_parts, total * (part + 1) // num_parts
    schema = pa.schema([(name, pa.string()) for name in urls.columns])
    found, end = [schema.empty_table()], 0
    for file, count in zip(urls.files, counts, strict=True):
        start, end = end, end + count
        if start >= last or end <= first:
            continue
        for rows, read in _pieces(file, urls.columns):
            low, high = max(0, first - start), min(rows, last - start)
            if low < high:
                found.append(read().select(urls.columns).slice(low, high - low).cast(schema))
            start += rows
    return pa.concat_tables(found).combine_chunks()


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
