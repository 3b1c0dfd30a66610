"""Downloading: slices of the list, the real img2dataset against a server of this machine, all the way to latents."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import picture_server
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from picture_server import BAD, GOOD, PictureServer
from tests_launcher import Launcher

from trainer.config import ConfigError
from trainer.data import download, encode
from trainer.data.images import decode as images
from trainer.data.images import img2dataset
from trainer.data.images.download_report import PartReport, total
from trainer.data.images.url_list import open_url_list, read_slice, split_http, table_digest
from trainer.data.index import build_index


def write_list(path: Path, rows: list[dict[str, Any]], group: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=group)
    else:
        options = pa_csv.WriteOptions(delimiter="\t" if path.suffix == ".tsv" else ",")
        pa_csv.write_csv(table, path, options)
    return path


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table.to_pylist()
    return found


ROWS = [{"score": i / 2, "text": f'a "dog", {i}\nNA', "link": f"HTTP://x/{i}"} for i in range(23)]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv"])
@pytest.mark.parametrize("num_parts", [1, 2, 5, 23, 30])
def test_slices_are_the_list_whatever_their_number(suffix: str, num_parts: int, tmp_path: Path) -> None:
    for number, (first, last) in enumerate(((0, 10), (10, 11), (11, 23))):
        write_list(tmp_path / f"{number}{suffix}", ROWS[first:last], group=4)
    urls = open_url_list(tmp_path, "link", "text", ("score",))
    parts = [read_slice(urls, part, num_parts) for part in range(num_parts)]
    found = [row for part in parts for row in rows_of(part)]
    assert [(row["link"], row["text"]) for row in found] == [(row["link"], row["text"]) for row in ROWS]
    assert [float(row["score"]) for row in found] == [row["score"] for row in ROWS]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len({table_digest(part) for part in parts if len(part)}) == min(num_parts, 23)


def test_only_http_is_asked_for() -> None:
    urls = [
        "http://a",
        "https://b",
        "file:///etc/passwd",
        "/etc/passwd",
        None,
        "",
        "ftp://c",
        "data:,x",
        "HTTPS://D",
        "http://",
    ]
    table = pa.table({"url": urls, "caption": ["x"] * len(urls)})
    kept, refused = split_http(table, "url")
    assert kept.column("url").to_pylist() == ["http://a", "https://b", "HTTPS://D"] and refused == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.parquet"], "nowhere.parquet is not there: name a .parquet, .csv or .tsv file"),
        (["."], ". is no list of URLs"),
        (["list.parquet", "--url-column", "link"], "list.parquet has no column link: it has url, caption"),
        (["broken.csv"], "broken.csv, line 2: unexpected end of data: mend the quotes of the rows before it"),
        (["list.parquet", "--parts", "0"], "--parts is 0: use 1 or more"),
        (["list.parquet", "--parts", "3", "--part", "3"], "--part is 3: use 0 to 2"),
        (["list.parquet", "--keep-columns", "key"], "--keep-columns key: img2dataset fills a column of that name"),
        (["list.parquet", "--encode-format", "png", "--encode-quality", "95"], "--encode-quality is 95: use 0 to 9"),
        (["list.parquet", "--python", "/bin/false"], "--python /bin/false does not start"),
        (["list.parquet", "--distributor", "ray"], "--distributor ray needs the package ray in the environment of"),
    ],
)
def test_user_errors_are_one_sentence_and_write_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] in ("list.parquet", "broken.csv"):
        write_list(tmp_path / "list.parquet", [{"url": "http://x", "caption": "y"}])
        (tmp_path / "broken.csv").write_bytes(b'url,caption\n"x')
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as caught:
        download.main([*arguments, "--out", "out"])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and len(error.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_another_version_or_python_is_refused(tmp_path: Path) -> None:
    fake = tmp_path / "python"

    def refused(content: dict[str, Any], message: str) -> None:
        fake.write_text(f"#!/bin/sh\necho '{json.dumps(content)}'\n")
        fake.chmod(0o755)
        with pytest.raises(ConfigError, match=message):
            img2dataset.check_environment(str(fake), "multiprocessing")

    found = {"img2dataset": "1.47.0", "python": "3.13.1", "imghdr": False, "ray": False, "pyspark": False}
    refused({**found, "img2dataset": None}, r"has img2dataset None: install img2dataset==1\.47\.0 there")
    refused(found, r"is 3\.13\.1, which img2dataset 1\.47\.0 cannot use \(no module imghdr\)")


def fake_python(path: Path, body: str) -> Path:
    """An interpreter that claims to have img2dataset and does something else in its place."""
    found = json.dumps({"img2dataset": "1.47.0", "python": "3.11.9", "imghdr": True, "ray": True, "pyspark": True})
    path.write_text(f"#!/bin/sh\ncase \"$*\" in *img2dataset.main*) {body};; *) echo '{found}';; esac\n")
    path.chmod(0o755)
    return path


def test_an_exit_code_of_0_is_not_believed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As with ray, or when every shard failed: it ends well and nothing is there."""
    urls = write_list(tmp_path / "urls.csv", [{"url": f"http://x/{i}", "caption": "y"} for i in range(5)])
    python = fake_python(tmp_path / "python", 'echo "$*"')
    command = [str(urls), "--out", str(tmp_path / "out"), "--python", str(python), "--samples-per-tar", "2"]
    with pytest.raises(SystemExit) as caught:
        download.main([*command, "--distributor", "ray"])
    printed = capsys.readouterr().out
    assert caught.value.code == 1 and "3  tars are not finished" in printed
    assert "part-00000 is not finished, see" in printed and "run the same command again" in printed
    log = (tmp_path / "out" / "logs" / "part-00000.log").read_text()
    assert "--distributor=ray" in log and f"--output_folder={tmp_path / 'out' / 'part-00000'}" in log
    assert "--resize_mode=keep_ratio" in log and "--resize_only_if_bigger=True" in log


def test_a_terminated_download_takes_img2dataset_with_it(tmp_path: Path, launcher: Launcher) -> None:
    urls = write_list(tmp_path / "urls.csv", [{"url": "http://x", "caption": "y"}])
    python = fake_python(tmp_path / "python", f"echo $$ > {tmp_path / 'pid'}; sleep 600")
    process = launcher.start(
        "-m", "trainer.data.download", str(urls), "--out", str(tmp_path / "out"), "--python", str(python)
    )
    wait_for(lambda: (tmp_path / "pid").is_file() and bool((tmp_path / "pid").read_text()))
    pid = int((tmp_path / "pid").read_text())
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 143
    wait_for(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes())


class StruckPopen(subprocess.Popen):  # type: ignore[type-arg]
    """A process whose parent gets SIGTERM before it knows of it."""

    started: ClassVar["list[StruckPopen]"] = []

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.started.append(self)
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_while_img2dataset_starts_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", StruckPopen)
    python = fake_python(tmp_path / "python", "sleep 600")
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with pytest.raises(SystemExit, match="143"), (tmp_path / "lock").open("w") as lock:
            img2dataset.run(str(python), ["img2dataset.main"], tmp_path / "log", lock.fileno(), lambda: True)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert [process.returncode for process in StruckPopen.started] == [-signal.SIGTERM]


def test_reports_add_up() -> None:
    one = PartReport(num_urls=5, num_pictures=3, num_tars=1, num_unfinished=0, reasons={"a": 1, "b": 1}, num_retry=1)
    two = PartReport(num_urls=7, num_pictures=2, num_tars=1, num_unfinished=1, reasons={"b": 30}, num_retry=0)
    assert total([one, two]).lines() == [
        "           5  pictures from 12 URLs (41.7%), 2 tars",
        "          31  b",
        "           1  a",
        "           1  tars are not finished",
    ]
    many = PartReport(
        num_urls=25,
        num_pictures=0,
        num_tars=1,
        num_unfinished=0,
        reasons={f"r{i:02d}": 1 for i in range(25)},
        num_retry=0,
    )
    assert len(many.lines()) == 22 and many.lines()[-1] == "           5  for other reasons"


NUM_GOOD, NUM_BAD, SAMPLES_PER_TAR = 200, 22, 40
SETTINGS = [
    "--image-size", "32", "--min-image-size", "16", "--samples-per-tar", str(SAMPLES_PER_TAR), "--threads", "16",
    "--timeout", "5", "--retries", "1", "--keep-columns", "source", "--parts", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[PictureServer]:
    running = PictureServer()
    yield running
    running.close()


def mixed_list(server: PictureServer) -> list[dict[str, Any]]:
    """200 good URLs in ten encodings and 22 bad ones, mixed; one good one without a caption, two that are no http."""
    good = [(i, GOOD[i % len(GOOD)]) for i in range(NUM_GOOD)]
    bad = [(1000 + i, BAD[i % len(BAD)]) for i in range(NUM_BAD)]
    rows = [
        {"url": server.url(seed, kind), "caption": f"picture {seed} as {kind}", "source": f"test {seed}"}
        for seed, kind in good + bad
    ]
    rows[5]["caption"] = None
    rows += [{"url": url, "caption": "local", "source": "x"} for url in ("file:///etc/hostname", None)]
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[i] for i in order]


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_from_urls_to_latents(
    server: PictureServer,
    tmp_path: Path,
    launcher: Launcher,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    urls = write_list(tmp_path / "urls.parquet", mixed_list(server), group=50)
    out = tmp_path / "images"
    command = [str(urls), "--out", str(out), *SETTINGS]
    (tmp_path / "poison").mkdir()
    (tmp_path / "poison" / "dataclasses.py").write_text("raise ImportError('not the standard library')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "poison"))
    _kill_and_complete(server, out, [*command, "--part", "0"], launcher, capsys)
    download.main([*command, "--part", "1"])
    _check_counts(out, capsys.readouterr().out)
    _check_refusals(urls, out, command, capsys)

    index = build_index(out)
    assert index is not None and index.num_kept == NUM_GOOD - 1  # without the one that has no caption
    assert index.rejected == {"empty caption": 1, "picture of one colour": 2}  # 16 bits saturated to white
    assert {row.part for row in index.rows()} == {"part-00000", "part-00001"}
    _check_pictures(index)
    encode.main(["debug", f"data.images={out}", f"data.latents={tmp_path / 'latents'}", "data.image_size=32"])
    assert json.loads((tmp_path / "latents" / "dataset.json").read_text())["num_samples"] == NUM_GOOD - 1


def _kill_and_complete(
    server: PictureServer, out: Path, command: list[str], launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kill ours when one tar is done: img2dataset lives on and is not disturbed; then lose a tar, and go on."""
    server.delay = 0.02
    process = launcher.start("-m", "trainer.data.download", *command)
    part = out / "part-00000"
    wait_for(lambda: len(list(part.glob("*_stats.json"))) >= 1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(SystemExit) as caught:
        download.main(command)
    assert caught.value.code == 2 and "is being downloaded by another process" in capsys.readouterr().err
    server.delay = 0.0
    wait_for(lambda: len(list(part.glob("*_stats.json"))) == 3)
    wait_for(lambda: not (part / "_tmp").exists())
    whole = (part / "00001.tar").read_bytes()
    (part / "00001.tar").write_bytes(whole[:612])  # in the middle of a member
    before = server.requests.copy()
    wait_for(lambda: _try(command))
    again = server.requests - before
    assert "part-00000: 00001.tar: tar that cannot be read: again" in capsys.readouterr().out
    assert 30 < len(again) <= SAMPLES_PER_TAR
    before = server.requests.copy()
    download.main(command)
    assert server.requests == before and "3 of 3 tars finished" in capsys.readouterr().out


def _try(command: list[str]) -> bool:
    """Whether the command ran; img2dataset needs a moment to end and give up its lock."""
    try:
        download.main(command)
    except SystemExit as error:
        assert error.code == 2
        return False
    return True


def _check_counts(out: Path, printed: str) -> None:
    num_pictures = NUM_GOOD + 2  # the white ones count as success
    assert f"{num_pictures}  pictures from {NUM_GOOD + NUM_BAD + 2} URLs" in printed.split("all parts")[1]
    reports = [PartReport(**json.loads(path.read_text())) for path in sorted((out / "reports").iterdir())]
    summary = total(reports)
    assert (summary.num_urls, summary.num_pictures, summary.num_unfinished) == (224, num_pictures, 0)
    assert sum(summary.reasons.values()) == 224 - num_pictures
    expected = {
        "HTTP Error 404: Not Found": 2,
        "HTTP Error 410: Gone": 2,
        "HTTP Error 500: Internal Server Error": 2,
        "image too small": 2,
        "aspect ratio too large": 2,
        "Use of image disallowed by X-Robots-Tag directive": 2,
        "not an http or https URL": 2,
    }
    assert {reason: summary.reasons.get(reason) for reason in expected} == expected
    failed = pq.read_table(out / "failed")
    assert failed.column_names == ["url", "caption", "source", "error_message"]
    kinds = sorted(url.rpartition("/")[2] for url in failed.column("url").to_pylist())
    assert kinds == ["broken", "broken", "reset", "reset"] and summary.num_retry == 4
    urls = open_url_list(out / "failed", "url", "caption", ("source",))
    assert len(read_slice(urls, 0, 1)) == 4  # the list for a second round


def _check_refusals(urls: Path, out: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def refused(arguments: list[str], message: str) -> None:
        with pytest.raises(SystemExit) as caught:
            download.main(arguments)
        assert caught.value.code == 2 and message in capsys.readouterr().err

    refused([*command, "--image-size", "64"], "--image-size is 64 but")
    refused(
        [*command, "--samples-per-tar", "10"], f"--samples-per-tar is 10 but {out / 'part-00000'} was begun with 40"
    )
    refused([*command, "--parts", "3"], f"{out} was begun with --parts 2, not 3: name another --out")
    rows = rows_of(pq.read_table(urls))
    rows[0], rows[1] = rows[1], rows[0]
    other = write_list(urls.with_name("other.parquet"), rows)
    refused([str(other), *command[1:]], "the list of URLs is not the one that")
    assert not any(path.suffix == ".json" for path in out.glob("part-*/*") if not path.name.endswith("_stats.json"))


def _check_pictures(index: Any) -> None:
    """Each kept picture is upright, in colours near those it was drawn with, beside its own caption."""
    worst = 0.0
    for row in index.rows():
        content = (index.folder / row.tar).read_bytes()[row.offset : row.offset + row.size]
        image = images.read_rgb(content, row.orientation)
        seed, kind = row.caption.split(" as ")
        assert image.size == (48, 32)
        drawn = picture_server.picture(int(seed.removeprefix("picture "))).resize((48, 32))
        if kind == "grey.jpg":
            drawn = drawn.convert("L").convert("RGB")
        error = np.abs(np.asarray(image, dtype=float) - np.asarray(drawn)).mean()
        worst = max(worst, error if kind not in ("cmyk.jpg", "palette.png", "gif") else error / 3)
    assert worst < 6
