"""Lists of URLs as people have them: each is read right, or refused in one sentence before anything is written."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_server import PictureServer

from trainer.config import ConfigError
from trainer.data import download
from trainer.data.images.download_report import DownloadProgress
from trainer.data.images.url_list import open_url_list, read_slice

TWO = [("http://a", "one"), ("http://b", "two")]
LONG = "x" * 3_000_000
READ: list[tuple[str, bytes, list[tuple[str | None, str | None]]]] = [
    ("plain.csv", b"url,caption\nhttp://a,one\nhttp://b,two\n", TWO),
    ("mark.csv", b"\xef\xbb\xbfurl,caption\r\nhttp://a,one\r\nhttp://b,two", TWO),
    ("blank_lines.CSV", b"caption,url\none,http://a\n\n\ntwo,http://b\n\n", TWO),
    ("empty_fields.csv", b"url,caption\nhttp://a,\n,NA\n", [("http://a", None), (None, "NA")]),
    ("long.csv", b"url,caption\nhttp://a," + LONG.encode(), [("http://a", LONG)]),
    ("lines.csv", b'url,caption\nhttp://a,"one\n""two"""\n', [("http://a", 'one\n"two"')]),
    ("inches.csv", b'url,caption\nhttp://a,a 12" pipe\n', [("http://a", 'a 12" pipe')]),
    ("begins.tsv", b'url\tcaption\nu1\t"a\nu2\tb"\nu3\t"c" d\n', [("u1", '"a'), ("u2", 'b"'), ("u3", '"c" d')]),
    ("quoted.tsv", b'"url"\t"caption"\n"u1"\t"a ""b""\tc\nd"\n', [("u1", 'a "b"\tc\nd')]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "rows"), READ, ids=[row[0] for row in READ])
def test_lists_are_read_as_they_are_meant(
    name: str, content: bytes, rows: list[tuple[str | None, str | None]], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    table = read_slice(open_url_list(tmp_path / name, "url", "caption"), 0, 1)
    assert list(zip(*table.to_pydict().values(), strict=True)) == rows


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("SAMPLE_ID,URL,TEXT,HEIGHT", ["URL", "TEXT"]),  # LAION
        ("uid,url,text,similarity", ["url", "text"]),  # DataComp
        ("image_url,text,Caption", ["image_url", "Caption"]),
        ("link,caption", "has no columns named url or image_url: name one by --url-column, of link, caption"),
        ("url,alt", "has no columns named caption or text: name one by --caption-column, of url, alt"),
        ("url,URL,text", "has 2 columns named url or image_url: name one by --url-column, of url, URL, text"),
    ],
)
def test_columns_of_public_lists_are_found(header: str, found: list[str] | str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(header + "\n")
    if isinstance(found, list):
        assert open_url_list(tmp_path / "list.csv", None, None).columns == found
        return
    with pytest.raises(ConfigError, match=f"list.csv {found}"):
        open_url_list(tmp_path / "list.csv", None, None)


BAD: list[tuple[str, bytes, str]] = [
    ("nothing.csv", b"", "nothing.csv is empty: its first line must name the columns"),
    ("blank.csv", b"\n \n", "blank.csv is empty: its first line must name the columns"),
    ("header.csv", b"url,caption\n", "header.csv: no row below the header, so there is nothing to download"),
    ("header.tsv", b"url\tcaption\n\n", "header.tsv: no row below the header"),
    ("latin.csv", b"url,caption\nhttp://a,caf\xe9\n", "latin.csv cannot be read as .csv ('utf-8' codec can't decode"),
    ("wide.csv", "url,caption\n".encode("utf-16"), "wide.csv cannot be read as .csv ('utf-8' codec can't decode"),
    ("fields.csv", b"url,caption\nhttp://a,b,c\n", "fields.csv, line 2: 3 fields where the header has 2"),
    ("fields.tsv", b"url\tcaption\nu\tb\nu\n", "fields.tsv, line 3: 1 fields where the header has 2"),
    ("quotes.csv", b'url,caption\nu,"a" b\n', "quotes.csv, line 2: ',' expected after '\"'"),
    ("swallow.csv", b'url,caption\nu,"12 inch\nv,b" c\n', "swallow.csv, line 3: ',' expected after '\"'"),
    ("pandas.tsv", b'url\tcaption\nu\t"a ""b"""\n', "pandas.tsv, line 2: \"a \"\"b\"\"\" has doubled quotes, but no"),
    ("twice.csv", b"url,url,caption\nu,v,c\n", "twice.csv has 2 columns named url: rename the others"),
    ("files.csv", b"url,caption\n/etc/passwd,x\n", "none of the 1 rows is an http or https URL: name another"),
    ("cut.parquet", b"PAR1 cut off", "cut.parquet cannot be read as .parquet"),
]  # fmt: skip


def refuse(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with code 2 and one sentence, and nothing in its folder has changed."""
    before = {path: path.lstat().st_mtime_ns for path in Path().rglob("*")}
    with pytest.raises(SystemExit) as caught:
        download.main(arguments)
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and caught.value.code == 2
    assert {path: path.lstat().st_mtime_ns for path in Path().rglob("*")} == before


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[row[0] for row in BAD])
def test_bad_lists_are_one_sentence(
    name: str,
    content: bytes,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    refuse([name, "--out", "out"], message, capsys)


def parquet(**columns: Any) -> None:
    pq.write_table(pa.table(columns), "list.parquet", compression="none")


def test_bad_columns_and_damage_of_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["list.parquet", "--out", "out"]
    parquet(url=["http://a"], caption=[["one", "two"]])
    refuse(arguments, "column caption of list.parquet holds list<element: string>: it must hold one text", capsys)
    parquet(url=["http://a"], caption=[b"caf\xe9"])
    refuse(arguments, "list.parquet cannot be read as .parquet (", capsys)
    parquet(url=[f"http://{i}" for i in range(1000)], caption=["text"] * 1000)
    whole = Path("list.parquet").read_bytes()
    Path("list.parquet").write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])
    refuse(arguments, "list.parquet cannot be read as .parquet (", capsys)
    parquet(url=pa.array(["http://a"], pa.large_string()), caption=[1.5])
    table = read_slice(open_url_list(Path("list.parquet"), "url", "caption"), 0, 1)
    assert table.to_pylist() == [{"url": "http://a", "caption": "1.5"}]


def test_places_that_cannot_be_used_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.csv").write_text("url,caption\nhttp://127.0.0.1:1/x,y\n")
    refuse(["list.csv", "--out", "list.csv"], f"--out=list.csv: {tmp_path}/list.csv is not a folder", capsys)
    refuse(["list.csv", "--out", "list.csv/x"], f"--out=list.csv/x: {tmp_path}/list.csv is not a folder", capsys)
    refuse(["list.csv", "--out", "/proc/1/x"], "--out=/proc/1/x: /proc/1 may not be written to", capsys)
    Path("away.csv").symlink_to("nowhere")
    refuse(["away.csv", "--out", "out"], "away.csv is not there", capsys)
    refuse(["list.csv", "--out", "away.csv"], "away.csv is not a folder", capsys)
    refuse(["list.csv", "--out", "out", "--caption-column", "url"], "column url is named for two purposes", capsys)
    for folder, name in (("lists", "part-00000-of-00001.json"), ("reports", "part-00001.json")):
        Path("out", folder).mkdir(parents=True)
        Path("out", folder, name).write_text("{")
    with pytest.raises(SystemExit) as caught:
        download.main(["list.csv", "--out", "out"])
    assert caught.value.code == 2 and "of-00001.json cannot be read as JSON: restore it" in capsys.readouterr().err


def test_a_download_that_stands_still_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("trainer.formats.progress_bar.FIRST_LINE", 0.0)
    monkeypatch.setattr("trainer.data.images.download_report.time.monotonic", lambda: now[0])
    with DownloadProgress(tmp_path, num_tars=2, tar_seconds=1000) as progress:
        assert progress()
        now[0] = 61
        (tmp_path / "00000.tar").write_bytes(bytes(2_000_000))
        assert progress() and re.search(r"0 of 2 tar, .*, 2 MB", capsys.readouterr().err)
        now[0] = 1500
        (tmp_path / "00000_stats.json").write_text("{}")
        assert progress()
        now[0] = 3000
        assert progress()
        now[0] = 3101
        assert not progress() and "no tar was finished in 1601 s" in capsys.readouterr().out


@pytest.mark.slow
def test_slow_hosts_end_and_no_picture_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = PictureServer()
    kinds = ["jpg", "drip", "drip-head", "jpg"]
    rows = [f"{server.url(seed, kind)},picture {seed}" for seed, kind in enumerate(kinds)]
    (tmp_path / "urls.csv").write_text("\n".join(["url,caption", *rows]))
    options = ["--image-size", "32", "--min-image-size", "16", "--retries", "0", "--threads", "4"]
    again = [str(tmp_path / "out" / "failed"), "--out", str(tmp_path / "again"), *options, "--tar-seconds", "1"]
    try:
        download.main([str(tmp_path / "urls.csv"), "--out", str(tmp_path / "out"), *options, "--download-seconds", "2"])
        printed = capsys.readouterr().out
        assert "2  pictures from 4 URLs" in printed and "2  took longer than --download-seconds" in printed
        with pytest.raises(SystemExit, match="1"):
            download.main(again)
    finally:
        server.close()
    printed = capsys.readouterr().out
    assert "2  took longer than" in printed and "no URL gave a picture: mend the network or the list" in printed
    with pytest.raises(SystemExit, match="1"):
        download.main(again)
    printed = capsys.readouterr().out
    assert "1 tars: no picture in any: again" in printed and "2  <urlopen error [Errno 111]" in printed
