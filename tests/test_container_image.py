"""slurm/container.sh: an image named by its place in a registry is fetched once, by stand-ins for the two programs."""

import subprocess
from pathlib import Path

import pytest
from tests_launcher import ROOT

FETCH = (
    '#!/bin/bash\n[ "$1" = {verb} ] || exit 1\necho "$*" >>{folder}/fetched\nsleep 0.3\necho image >"${{@: -2:1}}"\n'
)


def command(folder: Path, **settings: str) -> list[str]:
    """A shell that sources the file as lib.sh does, and says with what processes would start."""
    words = " ".join(f"{name}={value}" for name, value in settings.items())
    code = f"""
        say() {{ echo "$*" >&2; }}
        die() {{ echo "error: $*" >&2; exit 2; }}
        root=/repo head=n1 CONTAINER_MOUNTS= CONTAINER_CACHE={folder}/cache {words}
        . {ROOT}/slurm/container.sh
        echo ${{container[*]}} ${{in_srun[*]}}
    """
    return ["env", f"PATH={folder}:/usr/bin:/bin", "bash", "-uo", "pipefail", "-c", code]


@pytest.mark.parametrize(
    ("kind", "program", "verb", "image", "file"),
    [
        ("pyxis", "enroot", "import", "nvcr.io#nvidia/pytorch:26.01", "nvcr.io_nvidia_pytorch_26.01.sqsh"),
        ("apptainer", "apptainer", "pull", "docker://ubuntu:24.04", "ubuntu_24.04.sif"),
    ],
)
def test_an_image_is_fetched_once(tmp_path: Path, kind: str, program: str, verb: str, image: str, file: str) -> None:
    """By two jobs at the same time."""
    (tmp_path / program).write_text(FETCH.format(verb=verb, folder=tmp_path))
    (tmp_path / program).chmod(0o755)
    shell = command(tmp_path, CONTAINER=kind, CONTAINER_IMAGE=f"'{image}'")
    both = [subprocess.Popen(shell, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for job in both:
        said, _ = job.communicate(timeout=30)
        assert job.returncode == 0 and f"{tmp_path}/cache/{file}" in said, said
    assert len((tmp_path / "fetched").read_text().splitlines()) == 1
    (tmp_path / program).write_text("#!/bin/bash\nexit 1\n")
    other = command(tmp_path, CONTAINER=kind, CONTAINER_IMAGE="docker://other")
    done = subprocess.run(other, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "error: CONTAINER_IMAGE=docker://other cannot be fetched" in done.stderr


def test_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, CONTAINER="pyxis", CONTAINER_IMAGE="/images/a.sqsh"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--container-image=/images/a.sqsh" in done.stdout and "--container-mounts=/repo:/repo" in done.stdout
