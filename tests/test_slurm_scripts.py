"""What the batch scripts ask Slurm for and give to processes, with stand-ins for Slurm's commands that write it down.

Seconds, not minutes; how the real Slurm answers is seen in tests/test_slurm.py and tests/slurm/lifecycle.py.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tests_launcher import ROOT

SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$CALLS"
case "$1 $2" in
  "show hostnames") printf 'alpha\\nbeta\\n' ;;
  "show job") echo "JobId=77 JobState=${STATE:-COMPLETING} Reason=${REASON:-None} ExcNodeList=(null)" ;;
  "requeue 77") [ -z "${REFUSAL:-}" ] || { echo "$REFUSAL" >&2; exit 1; } ;;
esac
"""
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >"$CALLS.srun"
env >"$CALLS.env"
exit "${SRUN_CODE:-0}"
"""
OTHERS = '#!/bin/bash\necho "$(basename "$0") $*" >>"$CALLS"\n'
JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "x[1-2]", "ENVIRONMENT": "BATCH"}


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A folder for the path with the stand-ins; what they are asked goes to `calls` beside it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("scancel", OTHERS), ("sinfo", OTHERS)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def _environment(slurm: Path, **variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TRAIN", "MASTER", "OMP", "LAUNCHER"))}
    path = f"{slurm}:{os.environ['PATH']}"
    return {**kept, "PATH": path, "CALLS": str(slurm.parent / "calls"), "VENV": "none", **JOB, **variables}


def _script(slurm: Path, text: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run commands after slurm/lib.sh, under no signal that these tests were told to ignore (as by nohup)."""
    code = f"root={ROOT}\n. {ROOT}/slurm/lib.sh\n{text}"
    return subprocess.run(
        ["env", "--default-signal", "bash", "-c", code], env=_environment(slurm, **variables),
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "per_node", "world", "cpus"),
    [
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_ON_NODE": "64"}, 4, 8, 16),  # a task per GPU
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_NODE": "h100:2", "SLURM_CPUS_ON_NODE": "64"}, 2, 4, 32),
        ({"SLURM_CPUS_ON_NODE": "64"}, 1, 2, 64),  # no GPU: a task per node
        ({"SLURM_NTASKS": "6", "SLURM_CPUS_ON_NODE": "64"}, 3, 6, 21),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_ON_NODE": "64"}, 2, 4, 32),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_CPUS_PER_NODE": "48(x2)"}, 2, 4, 24),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "5", "SLURM_CPUS_ON_NODE": "64"}, 2, 4, 5),
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_ON_NODE": "4"}, 8, 16, 1),
    ],
)
def test_tasks_and_cores_follow_from_the_allocation(
    slurm: Path, variables: dict[str, str], per_node: int, world: int, cpus: int
) -> None:
    asked = 'echo "$per_node $world $cpus $head $MASTER_ADDR $LOCAL_WORLD_SIZE $NODE_NAMES $OMP_NUM_THREADS"'
    done = _script(slurm, asked, **variables)
    assert done.stdout.split() == [
        str(per_node), str(world), str(cpus), "alpha", "alpha", str(per_node), "alpha", "beta", str(cpus),
    ], done.stderr  # fmt: skip


def test_allocations_that_cannot_work_are_refused(slurm: Path) -> None:
    for variables, words in (
        ({"SLURM_JOB_ID": ""}, "this is no Slurm job"),
        ({"SLURM_NTASKS": "5"}, "5 tasks on 2 nodes are not the same number on each"),
        ({"SLURM_NTASKS_PER_NODE": "3", "SLURM_GPUS_ON_NODE": "2"}, "but the job has 2 GPUs per node"),
        ({"CONTAINER": "docker"}, "CONTAINER=docker is unknown"),
    ):
        done = _script(slurm, "echo reached", **variables)
        assert done.returncode == 2 and words in done.stderr and "reached" not in done.stdout


def test_processes_start_as_asked_with_a_rendezvous(slurm: Path, tmp_path: Path) -> None:
    start = 'launch LOGS --kill-on-bad-exit=1 --wait=60 -- python -m x "a b"; await; echo "code $code"'
    job = {"SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_ON_NODE": "8", "SLURM_RESTART_COUNT": "3", "SRUN_CODE": "9"}
    done = _script(slurm, start, **job, SRUN_ARGS="--mpi=pmix --gpu-bind=none", PYTHONPATH="/more")
    assert "code 9" in done.stdout
    assert (tmp_path / "calls.srun").read_text().splitlines() == [
        "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=4", "--cpu-bind=cores", "--mem-bind=local",
        "--output=LOGS/77.3.%t.log", "--open-mode=append", "--kill-on-bad-exit=1", "--wait=60", "--mpi=pmix",
        "--gpu-bind=none", "bash", f"{ROOT}/slurm/task.sh", "python", "-m", "x", "a b",
    ]  # fmt: skip
    given = dict(line.split("=", 1) for line in (tmp_path / "calls.env").read_text().splitlines() if "=" in line)
    assert given["LOG_STEM"] == "LOGS/77.3" and given["TRAIN_DEADLINE_MARGIN"] == "60"
    assert given["PYTHONPATH"] == f"{ROOT}:/more"
    assert 15000 <= int(given["MASTER_PORT"]) < 32768, "below the ports that the kernel hands out"


@pytest.mark.parametrize(
    ("variables", "code", "asked"),
    [
        ({}, 0, "scontrol requeue 77"),
        ({"REQUEUE": "no"}, 75, ""),
        ({"ENVIRONMENT": "INTERACTIVE"}, 75, ""),
        ({"ENDED": "1"}, 143, ""),
        ({"ENDED": "1", "REASON": "TimeLimit"}, 0, "scontrol requeue 77"),
        ({"REFUSAL": "Requested operation is presently disabled for job 77"}, 75, "scontrol requeue 77"),
        ({"REFUSAL": "Unable to contact slurm controller"}, 75, "scontrol requeue 77"),
    ],
)
def test_a_job_requeues_itself_only_where_it_may(slurm: Path, variables: dict[str, str], code: int, asked: str) -> None:
    done = _script(slurm, "ended_by_slurm=${ENDED:-0} REQUEUE_SECONDS=0; again; echo reached", **variables)
    assert done.returncode == code and "reached" not in done.stdout, done.stdout + done.stderr
    calls = (slurm.parent / "calls").read_text().splitlines()
    assert [call for call in calls if call.startswith("scontrol requeue")] == ([asked] if asked else [])


@pytest.mark.parametrize(
    ("name", "state", "answer"),
    [("TERM", "COMPLETING", "0 1"), ("TERM", "RUNNING", "1 0"), ("HUP", "RUNNING", "1 0"), ("USR1", "RUNNING", "1 0")],
)
def test_a_signal_to_the_script_is_a_warning_unless_slurm_ends_the_job(
    slurm: Path, name: str, state: str, answer: str
) -> None:
    done = _script(slurm, f'kill -s {name} $$; echo "told $told $ended_by_slurm"', STATE=state)
    assert f"told {answer}\n" in done.stdout, done.stdout + done.stderr


RANKS = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $TRAIN_INCIDENTS"'


def test_a_process_takes_its_rank_from_its_launcher(slurm: Path, tmp_path: Path) -> None:
    stem = str(tmp_path / "7.0")
    by_srun = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
    by_mpi = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}
    command = ["bash", str(ROOT / "slurm" / "task.sh"), "bash", "-c", RANKS]
    environment = _environment(slurm, LAUNCHER="srun", LOG_STEM=stem, **by_srun, **by_mpi)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["5", "1", "8", f"{stem}.5.jsonl"]
    subprocess.run(command, env={**environment, "LAUNCHER": "mpirun"}, capture_output=True, check=True)
    assert (tmp_path / "7.0.2.log").read_text().split() == ["2", "0", "4", f"{stem}.2.jsonl"]


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGUSR1, ""), (signal.SIGTERM, ""), (signal.SIGTERM, "yes")])
def test_a_warning_does_not_kill_what_has_not_started(slurm: Path, tmp_path: Path, number: int, ends: str) -> None:
    command = ["bash", str(ROOT / "slurm" / "task.sh"), "bash", "-c", f"touch {tmp_path}/up; sleep 1 & wait; exit 7"]
    variables = {"LAUNCHER": "srun", "LOG_STEM": str(tmp_path / "7.0"), "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    environment = _environment(slurm, **variables, SLURM_NTASKS="1", **({"TERM_ENDS": ends} if ends else {}))
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 30
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(30) == (-number if ends else 7)


# The script waits for its processes while the one beside it passes the warning on.
WARN = 'step=$!; echo $step >"$CALLS.pid"; relay & wait "$step"; echo "code $?"; wait'


def test_a_warning_reaches_the_processes_without_a_controller(slurm: Path) -> None:
    (slurm / "scancel").write_text(OTHERS + "exit 1\n")
    done = _script(slurm, f"bash -c 'trap \"exit 5\" USR1; for n in $(seq 50); do sleep 0.1; done' & sleep 0.5; {WARN}")
    assert "code 5" in done.stdout and "still running" not in done.stdout, done.stdout + done.stderr


def test_who_ends_while_slurm_is_asked_is_not_ended_again(slurm: Path) -> None:
    """Else the signal might meet the processes of the job's next start."""
    (slurm / "scancel").write_text(OTHERS + 'kill "$(<"$CALLS.pid")"; sleep 0.5\n')
    done = _script(slurm, f"sleep 60 & {WARN}")
    calls = (slurm.parent / "calls").read_text().splitlines()
    assert "code 143" in done.stdout and "still running" not in done.stdout, done.stdout + done.stderr
    assert [call for call in calls if call.startswith("scancel")] == ["scancel --signal=USR1 77"]
