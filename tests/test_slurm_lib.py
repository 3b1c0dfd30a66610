"""slurm/lib.sh on a real Slurm, with small programs in place of a training run: each scenario takes seconds."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from tests_launcher import ROOT

pytestmark = pytest.mark.slow

# Each process runs PROGRAM until the file `go` appears or, unless it is deaf, until it is told to stop.
SCRIPT = """#!/bin/bash
#SBATCH --requeue --open-mode=append
root={root}
. "$root/slurm/lib.sh" || exit 2
launch {folder} --kill-on-bad-exit=1 -- python -u {folder}/program.py {folder} "$job" "$@"
await
if [ "$told" = 1 ] || [ "$ended_by_slurm" = 1 ]; then again {folder}; fi
exit "$code"
"""
PROGRAM = """
import os, pathlib, signal, sys, time
folder, job, *words = sys.argv[1:]
folder, rank = pathlib.Path(folder), os.environ["RANK"]
print("start of", job, os.environ["SLURM_JOB_ID"], os.environ["SLURM_NODELIST"])
def told(*_):
    print("told to stop")
    sys.exit(0)
def stuck():
    while not (folder / "go").exists() and not (folder / ("go" + job)).exists():
        time.sleep(0.1)
if "deaf" not in words:
    signal.signal(signal.SIGUSR1, told)
    signal.signal(signal.SIGTERM, told)
stuck()
"""
PAIR = ("--nodes=2", "--ntasks-per-node=1")


class Jobs:
    """Submits SCRIPT with a PROGRAM in a folder of its own."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "logs").mkdir()
        (folder / "program.py").write_text(PROGRAM)

    def write(self, text: str) -> Path:
        script = self.folder / "job.sbatch"
        script.write_text(text.format(root=ROOT, folder=self.folder))
        return script

    def submit(self, *words: str, options: tuple[str, ...] = PAIR, text: str = SCRIPT, **environment: str) -> str:
        options = ("--mem=200M", "--cpus-per-task=1", f"--output={self.cluster.folder}/%A_%a.log", *options)
        script = self.write(text)
        return self.cluster.call("sbatch", "--parsable", *options, str(script), *words, **environment).strip()

    def log(self, job: str) -> str:
        """Of a job or of `JOB_TASK`."""
        name = job if "_" in job else f"{job}_4294967294"  # what Slurm writes for %a without an array
        path = self.cluster.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def said(self, job: str, restart: int = 0, rank: int = 0) -> str:
        path = self.folder / f"{job}.{restart}.{rank}.log"
        return path.read_text() if path.exists() else ""

    def until_said(self, words: str, job: str, restart: int = 0, rank: int = 0) -> None:
        self.cluster.until(lambda: words in self.said(job, restart, rank), 120)

    def until_logged(self, words: str, job: str, seconds: float = 120) -> None:
        try:
            self.cluster.until(lambda: words in self.log(job), seconds)
        except TimeoutError as error:
            raise TimeoutError(self.log(job)) from error

    def warn(self, job: str) -> None:
        self.cluster.call("scancel", "--batch", "--signal=USR1", job)


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path) -> Iterator[Jobs]:
    """What a failed test leaves running would hold the nodes of the next."""
    yield Jobs(cluster, tmp_path)
    cluster.call("scancel", "--user=root")


def test_an_arrays_last_task_is_warned_and_requeued_alone(jobs: Jobs) -> None:
    """Its SLURM_JOB_ID is the whole array's. One sibling has finished, the other must not notice."""
    array = jobs.submit(options=("--array=0-2", "--ntasks=1"))
    tasks = [f"{array}_{number}" for number in range(3)]
    for task in tasks:
        jobs.until_said("start of", task)
    assert f"start of {array}_2 {array} " in jobs.said(tasks[2]), "else nothing is tested"
    (jobs.folder / f"go{tasks[0]}").touch()
    jobs.cluster.until(lambda: jobs.cluster.job(tasks[0])["JobState"] == "COMPLETED", 30)
    jobs.warn(tasks[2])
    jobs.until_said("start of", tasks[2], restart=1)
    (jobs.folder / "go").touch()
    assert jobs.cluster.wait(*tasks, seconds=60) == ["COMPLETED"] * 3
    assert "told to stop" in jobs.said(tasks[2]) and "told to stop" not in jobs.said(tasks[1])
    assert [jobs.cluster.job(task)["Restarts"] for task in tasks] == ["0", "0", "1"]
    assert "back in the queue" in jobs.log(tasks[2]) and "refused" not in "".join(map(jobs.log, tasks))


def test_hung_processes_show_their_stacks_and_the_job_comes_back(jobs: Jobs) -> None:
    job = jobs.submit("deaf", STOP_SECONDS="3")
    jobs.until_said("start of", job, rank=1)
    jobs.warn(job)
    jobs.until_said("start of", job, restart=1)
    assert "still running 3 s after they were asked to stop" in jobs.log(job)
    for rank in (0, 1):
        assert "Fatal Python error: Aborted" in jobs.said(job, rank=rank) and "in stuck" in jobs.said(job, rank=rank)
    jobs.cluster.call("scancel", job)


def test_hung_processes_are_ended_within_the_grace_of_a_preemption(jobs: Jobs) -> None:
    """40 s in the test cluster, of which half are waited; Slurm moves the job's end when it preempts.

    On a machine that stands still meanwhile the grace is over, and then it is Slurm that puts the job back.
    """
    job = jobs.submit("deaf", options=(*PAIR, "--signal=B:USR1@60"))
    jobs.until_said("start of", job, rank=1)
    urgent = jobs.cluster.call(
        "sbatch", "--parsable", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "true"
    )
    jobs.until_said("start of", job, restart=1)
    log = jobs.log(job)
    assert "their stacks go to their logs" in log
    assert "back in the queue" in log or "DUE TO PREEMPTION" in log
    assert "in stuck" in jobs.said(job, rank=0) and "in stuck" in jobs.said(job, rank=1)
    jobs.cluster.call("scancel", job, urgent.strip())


def test_what_a_user_cancels_stays_cancelled(jobs: Jobs) -> None:
    """One whose processes end, and one that hangs, where KILL follows."""
    quick, hung = jobs.submit(), jobs.submit("deaf")
    for job in (quick, hung):
        jobs.until_said("start of", job, rank=1)
    jobs.cluster.call("scancel", quick, hung)
    assert jobs.cluster.wait(quick, hung, seconds=60) == ["CANCELLED"] * 2
    time.sleep(6)  # a requeued job would be held for 5 s
    # Where the machine is slow, KILL may come before the script has said why it does nothing.
    assert not any("back in the queue" in jobs.log(job) for job in (quick, hung))
    for job in (quick, hung):
        assert jobs.cluster.job(job)["JobState"] == "CANCELLED" and jobs.cluster.job(job)["Restarts"] == "0"
        assert not jobs.said(job, restart=1)


def test_slurms_own_refusal_ends_the_job_at_once(jobs: Jobs) -> None:
    job = jobs.submit(options=(*PAIR, "--no-requeue"))
    jobs.until_said("start of", job, rank=1)
    jobs.warn(job)
    assert jobs.cluster.wait(job, seconds=60) == ["FAILED"] and jobs.cluster.job(job)["ExitCode"] == "75:0"
    assert "requeueing is refused here (Requested operation is presently disabled" in jobs.log(job)


ALLOCATION = """#!/bin/bash
root={root}
RANDOM=1
. "$root/slurm/lib.sh" || exit 2
first=$MASTER_PORT
python -m http.server "$first" >/dev/null 2>&1 &
server=$!
until grep -q ":$(printf %04X "$first") " /proc/net/tcp*; do sleep 0.1; done
RANDOM=1
. "$root/slurm/lib.sh"
launch {folder} -- bash -c 'echo "GPUs \\"$CUDA_VISIBLE_DEVICES\\""'
await
say "$world processes"
[ "$first" = "$MASTER_PORT" ] || say "another port"
kill "$server"
"""


def test_no_gpus_on_nodes_with_gpus_and_a_port_that_is_taken(jobs: Jobs) -> None:
    job = jobs.submit(options=("--nodes=2", "--gpus-per-node=0", "--exclusive"), text=ALLOCATION)
    assert jobs.cluster.wait(job, seconds=60) == ["COMPLETED"], jobs.log(job)
    assert jobs.said(job, rank=1) == 'GPUs ""\n'
    assert "2 processes" in jobs.log(job) and "another port" in jobs.log(job)


def test_submitted_from_elsewhere_the_repository_is_found(jobs: Jobs) -> None:
    """Without a recipe, which is the first thing that the script says once it has found its repository."""
    foreign = shutil.copy(ROOT / "slurm" / "train.sbatch", jobs.folder / "copy.sbatch")
    options = ("--mem=1G", "--parsable", "--nodes=1", "--gpus-per-node=1", f"--output={jobs.cluster.folder}/%j.log")
    place = f"--chdir={jobs.folder}"
    for script, sentence in (
        (ROOT / "slurm" / "train.sbatch", "error: no recipe: sbatch slurm/train.sbatch"),
        (Path(foreign), "error: no repository around this script: set REPOSITORY="),
    ):
        job = jobs.cluster.call("sbatch", *options, place, str(script), cwd=jobs.folder).strip()
        assert jobs.cluster.wait(job, seconds=60) == ["FAILED"]
        assert jobs.cluster.log(job).startswith(sentence) and jobs.cluster.job(job)["ExitCode"] == "2:0"


def test_a_judge_that_crashes_is_no_refusal(jobs: Jobs) -> None:
    """The count of failures cannot be read, and srun starts nothing."""
    run = jobs.folder / "run"
    run.mkdir()
    (run / "failures.json").write_text("{")
    one = ("--ntasks-per-node=1", "--gpus-per-node=1")
    job = jobs.cluster.submit("train", "debug", f"run_dir={run}", options=one, DOCTOR="no", SRUN_ARGS="--nonsense")
    assert jobs.cluster.wait(job, seconds=90) == ["FAILED"], jobs.cluster.log(job)
    assert jobs.cluster.job(job)["ExitCode"] == "1:0"
    assert "verdict: none, the judge ended with code 1" in jobs.cluster.log(job)
