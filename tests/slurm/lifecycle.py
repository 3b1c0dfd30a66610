"""Lives of a training job on a real Slurm: whatever ends it, it completes by itself, as if nothing had happened.

    python tests/slurm/lifecycle.py                     # all scenarios, about a minute each; needs root
    python tests/slurm/lifecycle.py head_dies shrink_and_grow

In each scenario `metrics.jsonl` must have every step once and in order, with the losses of an unbroken run of two
processes: equal bits where the topology stays, 1e-5 where it changes, until rounding tips an expert's choice.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import psutil
from slurm_cluster import Cluster
from story import PAIR, SETTINGS, STEPS, Story
from tests_launcher import ROOT, Launcher, metrics


def administrator_requeues(story: Story) -> None:
    """scontrol requeue from outside, while training."""
    story.train()
    story.reach(40)
    story.cluster.call("scontrol", "requeue", story.job)
    story.complete(restarts=1)


def save_and_come_back(story: Story) -> None:
    """The user's own warning signal."""
    story.train()
    story.reach(40)
    story.cluster.call("scancel", "--batch", "--signal=USR1", story.job)
    story.complete(restarts=1)


def a_rank_hangs_unnoticed(story: Story) -> None:
    """A process is frozen, and nobody notices before the job is warned: stacks, KILL, and back into the queue."""
    story.train("train.hang_seconds=0", STOP_SECONDS="10", TRAIN_SILENCE_SECONDS="600")
    story.reach(50)
    command = f"trainer.train .*run_dir={story.run}"
    ranks = subprocess.run(["pgrep", "-f", command], capture_output=True, text=True, check=True).stdout.split()
    subprocess.run(["kill", "-STOP", ranks[-1]], check=True)
    story.cluster.call("scancel", "--batch", "--signal=USR1", story.job)
    story.complete(restarts=1)
    assert "ended as it hung in " in story.cluster.log(story.job)


def time_limit_comes(story: Story) -> None:
    """A limit of one minute is too short; the run leaves in time each time."""
    story.train(options=(*PAIR, "--time=1", "--signal=B:USR1@1"), TRAIN_DEADLINE_MARGIN="42")
    story.complete(restarts=1)
    assert "time limit near" in (story.run / "train.log").read_text()


def node_dies(story: Story) -> None:
    """Power cut of the second node while training: the first names it; another takes its place."""
    story.train()
    story.reach(50)
    lost = story.nodes()[1]
    story.cut(lost)
    story.cluster.until(lambda: f"rank 1 on node {lost} is lost" in story.rank_logs(), 60, story.job)
    story.complete(restarts=1)
    story.cluster.power_on()


def head_dies(story: Story) -> None:
    """Power cut of the node with rank 0 and the batch script."""
    story.train()
    story.reach(50)
    lost = story.nodes()[0]
    story.cut(lost)
    story.cluster.until(lambda: f"rank 0 on node {lost} is lost" in story.rank_logs(), 60, story.job)
    story.complete(restarts=1)
    story.cluster.power_on()


def a_rank_hangs(story: Story) -> None:
    """A process is stopped while its node and connections live: it is named, and the next start avoids its node."""
    story.train("train.hang_seconds=6", TRAIN_SILENCE_SECONDS="600")
    story.reach(50)
    lost = story.nodes()[1]
    for process in psutil.process_iter():
        if f"run_dir={story.run}" in process.cmdline() and process.environ().get("RANK") == "1":
            process.suspend()
    story.cluster.until(lambda: f"rank 1 on node {lost} stopped beating" in story.rank_logs(), 60, story.job)
    story.complete(restarts=1)
    assert f"back in the queue, without {lost}" in story.cluster.log(story.job), story.cluster.log(story.job)
    assert "most recent call first" in (story.run / "logs" / f"{story.job}.0.0.stacks").read_text()


def node_dies_while_saving(story: Story) -> None:
    """Power cut in the middle of a checkpoint; the node comes back at once."""
    story.train("train.checkpoint_every=1")
    story.reach(40)
    folder = story.run / "checkpoints"
    end = time.monotonic() + 60
    while not list(folder.glob("step_*.tmp")) and time.monotonic() < end:
        pass
    story.cut(story.nodes()[1])
    story.cluster.power_on()
    story.complete(restarts=1)


def controller_restarts(story: Story) -> None:
    """slurmctld is killed and started again: the job goes on."""
    story.train()
    story.reach(20)
    story.cut("ctl")
    time.sleep(3)
    story.cluster.power_on()
    story.complete(restarts=0)


def controller_is_down_when_a_job_leaves(story: Story) -> None:
    """The run saves and ends while no slurmctld answers; the job waits for one and requeues itself."""
    story.train()
    story.reach(40)
    story.cluster.call("scancel", "--batch", "--signal=USR1", story.job)
    story.cluster.call("scontrol", "shutdown", "slurmctld")
    story.cluster.until(lambda: "Slurm does not answer, trying again" in story.cluster.log(story.job), 120)
    story.cluster.power_on()
    story.complete(restarts=1)


def shrink_and_grow(story: Story) -> None:
    """Four ranks on two nodes, then two on one, then four again."""
    for step, nodes in ((30, 2), (80, 1), (STEPS, 2)):
        options = (f"--nodes={nodes}", "--ntasks-per-node=2", "--gpus-per-node=2")
        story.train("train.micro_batch_size=2", options=options, REQUEUE="no")
        if step < STEPS:
            story.reach(step)
            story.cluster.call("scancel", "--batch", "--signal=USR1", story.job)
            assert story.cluster.wait(story.job) == ["FAILED"] and story.cluster.job(story.job)["ExitCode"] == "75:0"
    story.complete(bitwise=False)
    assert story.world_sizes() == ["4", "2", "4"]
    assert "elastic: global batch 8 on 2 processes" in (story.run / "train.log").read_text()


def a_range_of_nodes(story: Story) -> None:
    """Submitted with --nodes=1-2: when one of its nodes dies and the others are busy, it goes on with the one left."""
    busy = story.cluster.call("sbatch", "--parsable", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 600")
    story.train(options=("--nodes=1-2", "--gpus-per-node=1"))
    story.reach(100)
    story.cut(story.nodes()[1])
    story.complete(bitwise=False, restarts=1)
    story.cluster.call("scancel", busy.strip())
    story.cluster.power_on()
    assert story.world_sizes() == ["2", "1"]


def scored_while_it_trains(story: Story) -> None:
    """eval.sbatch --watch beside the training job: it scores checkpoints as they come, and ends with the last."""
    data = story.make_data(32)
    story.train(*data, "model.patch_size=4", "diffusion.sampling_steps=2")
    story.reach(1)
    options = ("--ntasks-per-node=2", "--gpus-per-node=2")
    score = story.cluster.submit("eval", "--watch", "1", str(story.run), "--suite", "geneval", "--per-category", "1",
                                 options=options)  # fmt: skip
    assert story.cluster.wait(story.job, score, seconds=400) == ["COMPLETED"] * 2, story.cluster.log(score)
    assert (story.run / "eval" / f"step_{STEPS:08d}" / "report.json").is_file()
    assert f"the last checkpoint, step {STEPS}, is scored" in story.cluster.log(score)
    assert list((story.run / "tensorboard" / "eval").iterdir())


def launched_by_mpirun(story: Story) -> None:
    """Open MPI inside the job, stopped once."""
    story.train(LAUNCHER="mpirun", OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    story.reach(40)
    story.cluster.call("scancel", "--batch", "--signal=USR1", story.job)
    story.complete(restarts=1)


def launched_by_pmix(story: Story) -> None:
    """srun with MPI's own plug-in."""
    story.train(SRUN_ARGS="--mpi=pmix")
    story.complete()


def discovered_by_mpi4py(story: Story) -> None:
    """mpirun by hand, no rank variables: DeepSpeed asks MPI."""
    command = f"MASTER_PORT=15999 mpirun -np 2 --map-by ppr:1:node {sys.executable} -m trainer.train"
    words = " ".join((*SETTINGS, f"run_dir={story.run}"))
    story.job = story.cluster.call(
        "sbatch", "--parsable", *PAIR[:2], "--mem=1G", f"--output={story.cluster.folder}/%j.log", "--wrap",
        f"{command} {words}", OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", PYTHONPATH=str(ROOT),
    ).strip()  # fmt: skip
    story.complete()


def bad_node_is_left_out(story: Story) -> None:
    """The data are missing on one node: the doctor names it, the next start avoids it."""
    *data, latents, _ = story.make_data(8)
    local = story.cluster.folder / "local"
    for number in (1, 3, 4):
        place = story.cluster.folder / "spool" / f"n{number}" / "local"
        subprocess.run(["cp", "-r", latents.split("=")[1], str(place / "latents")], check=True)
    story.train(*data, f"data.latents={local / 'latents'}", "train.max_steps=20", DOCTOR="yes",
                options=("--nodelist=n1", *PAIR))  # fmt: skip
    assert story.cluster.wait(story.job) == ["COMPLETED"], story.cluster.log(story.job)
    log = story.cluster.log(story.job)
    assert "fix: node n2: " in log and "back in the queue, without n2" in log, log
    assert [entry["step"] for entry in metrics(story.run)] == list(range(1, 21))


def crashes_twice(story: Story) -> None:
    """A process that dies at the same step twice ends the job for good."""
    story.train("train.checkpoint_every=0")
    for start in range(2):
        story.reach(3)
        if start:
            story.cluster.until(lambda: f"{story.job}.1: logs of" in story.cluster.log(story.job), 60, story.job)
            time.sleep(8)
        subprocess.run(["pkill", "-9", "-f", f"trainer.train .*run_dir={story.run}"], check=False)
        if not start:
            story.cluster.until(lambda: "back in the queue" in story.cluster.log(story.job), 120, story.job)
    assert story.cluster.wait(story.job) == ["FAILED"]
    assert "died 2 times in a row before the first checkpoint: giving up" in story.cluster.log(story.job)


def chained_without_requeue(story: Story) -> None:
    """Three links with one name; the first is stopped, the second finishes, the third has nothing to do."""
    options = (*PAIR, "--job-name=chain", "--dependency=singleton")
    jobs = [story.train(options=options, REQUEUE="no") for _ in range(3)]
    story.reach(40)
    story.cluster.call("scancel", "--batch", "--signal=USR1", jobs[0])
    assert story.cluster.wait(*jobs) == ["FAILED", "COMPLETED", "COMPLETED"]
    assert story.cluster.job(jobs[0])["ExitCode"] == "75:0"
    assert "nothing to do" in story.cluster.log(jobs[2])
    story.compare(bitwise=True)


def a_chain_is_stopped(story: Story) -> None:
    """RUN/stop ends all links; when it is removed, another job goes on."""
    options = (*PAIR, "--job-name=chain", "--dependency=singleton")
    jobs = [story.train(options=options, REQUEUE="no") for _ in range(3)]
    story.reach(40)
    stop = story.run / "stop"
    stop.touch()
    assert story.cluster.wait(*jobs) == ["FAILED"] * 3
    assert [story.cluster.job(job)["ExitCode"] for job in jobs] == ["75:0", "2:0", "2:0"]
    sentence = f"error: {stop} asks this run to stop: remove the file, then start it again"
    assert sentence in story.cluster.log(jobs[1]) and sentence in story.cluster.log(jobs[2])
    stop.unlink()
    story.train()
    story.complete()


def chained_by_an_array(story: Story) -> None:
    """As before, the links being tasks of which one runs at a time."""
    story.train(options=(*PAIR, "--array=1-3%1", f"--output={story.cluster.folder}/%A_%a.log"), REQUEUE="no")
    jobs = [f"{story.job}_{number}" for number in (1, 2, 3)]
    story.reach(40)
    story.cluster.call("scancel", "--batch", "--signal=USR1", jobs[0], check=False)  # Slurm 22.05: sent, and code 229
    assert story.cluster.wait(*jobs) == ["FAILED", "COMPLETED", "COMPLETED"]
    assert "nothing to do" in story.cluster.log(jobs[2])
    story.compare(bitwise=True)


def array_of_runs(story: Story) -> None:
    """Three runs in an array; only the last, whose SLURM_JOB_ID is the array's, is stopped and starts again."""
    base = story.run
    story.run = Path(f"{base}_%a")
    one = ("--nodes=1", *PAIR[1:3], f"--output={story.cluster.folder}/%A_%a.log")
    story.train("seed=%a", "parallel.ep_size=1", options=("--array=0-2", *one))
    tasks = [f"{story.job}_{number}" for number in range(3)]
    story.run = Path(f"{base}_2")
    story.reach(10)
    story.cluster.call("scancel", "--batch", "--signal=USR1", tasks[2])
    assert story.cluster.wait(*tasks) == ["COMPLETED"] * 3
    assert [story.cluster.job(task)["Restarts"] for task in tasks] == ["0", "0", "1"]
    assert "refused" not in "".join(map(story.cluster.log, tasks))
    for number in range(3):
        assert len(metrics(Path(f"{base}_{number}"))) == STEPS
    assert "seed: 2" in (Path(f"{base}_2") / "config.yaml").read_text()


def within_salloc(story: Story) -> None:
    """The script itself, in an interactive allocation."""
    arguments = ["bash", "slurm/train.sbatch", *SETTINGS, f"run_dir={story.run}"]
    output = story.cluster.call("salloc", *PAIR, "--mem=1G", *arguments, check=False, DOCTOR="yes")
    assert "sound, checked 2 processes" in output and "verdict: done" in output, output
    story.compare(bitwise=True)


def mixed_names_and_an_interface(story: Story) -> None:
    """Nodes whose names no pattern fits, rendezvous over a named interface."""
    other = Cluster(nodes="gpu-a01,b7-x")
    try:
        story.cluster = other
        story.train(NETWORK_INTERFACE="eth0", DOCTOR="yes")
        story.complete()
        assert "rendezvous at 198." in other.log(story.job)
    finally:
        other.stop()


SCENARIOS: tuple[Callable[[Story], None], ...] = (
    administrator_requeues, save_and_come_back, a_rank_hangs, a_rank_hangs_unnoticed, time_limit_comes, node_dies,
    head_dies, node_dies_while_saving, controller_restarts, controller_is_down_when_a_job_leaves, shrink_and_grow,
    a_range_of_nodes, scored_while_it_trains, launched_by_mpirun, launched_by_pmix, discovered_by_mpi4py,
    bad_node_is_left_out, crashes_twice, chained_without_requeue, a_chain_is_stopped, chained_by_an_array,
    array_of_runs, within_salloc, mixed_names_and_an_interface,
)  # fmt: skip


def install_mpi() -> None:
    """Open MPI and the library of Slurm's pmix plug-in, before Slurm starts."""
    command = ["apt-get", "-y", "--no-install-recommends", "install", "openmpi-bin", "libpmix-dev"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    """Run the scenarios; returns how many failed."""
    names = [scenario.__name__ for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", choices=[*names, []])
    chosen = parser.parse_args().scenarios or names
    if any("mpi" in name or "pmix" in name for name in chosen):
        install_mpi()
    folder, cluster, failed = Path(tempfile.mkdtemp(prefix="lives")), Cluster(nodes=4), 1
    try:
        print(f"runs in {folder}, Slurm in {cluster.folder}", flush=True)
        reference = ["-m", "trainer.train", *SETTINGS, f"run_dir={folder / 'reference'}"]
        assert Launcher().run(*reference, processes=2).returncode == 0
        failed = sum(not holds(s, Story(cluster, folder, s.__name__)) for s in SCENARIOS if s.__name__ in chosen)
        return failed
    finally:
        cluster.stop()
        if not failed:  # else there is something to look at
            shutil.rmtree(folder)


def holds(scenario: Callable[[Story], None], story: Story) -> bool:
    """Run a scenario and say how it went."""
    start, result = time.monotonic(), "holds"
    try:
        scenario(story)
    except (AssertionError, RuntimeError, TimeoutError) as error:
        result = f"FAILED: {error!r}"
        story.cluster.call("scancel", "-u", "root", check=False)
        story.cluster.power_on()
    print(f"{scenario.__name__:32} {time.monotonic() - start:6.0f} s  {result}", flush=True)
    return result == "holds"


if __name__ == "__main__":
    sys.exit(main())
