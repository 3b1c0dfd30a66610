"""Checks the nodes of a job, and what a run needs of them, before it trains.

    python -m trainer.doctor CONFIG [key=value ...]            # this machine; under srun or torchrun all nodes
    --bad-nodes FILE       write `NODE REASON` lines of nodes to leave out; the file exists if the checks came to an end
    --only-config          check what needs no nodes: the configuration, with --world-size N also data and checkpoint;
                           print run_dir, data.images, and `done` if nothing is left to train

Per node: GPU count and arithmetic, driver, memory errors, memory, versions equal, clock, free space, write speed and
atomic rename in the run folder's file system, configuration and data readable. Between nodes: all-reduce and all-to-all
correct, their bandwidth, and that of pairs of nodes. Exit codes: 0 sound, 1 with the sentences that say what to fix.
"""

import os
import sys
import time
from pathlib import Path

from trainer.config import TrainConfig, command, command_parser, load_config
from trainer.files import replacing


def check_config(config: TrainConfig, world_size: int, local_size: int) -> None:
    """Check the configuration, for a number of processes also data and checkpoint; print what the batch scripts ask."""
    done = False
    if world_size:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the head may have no GPU
        from trainer.cluster.verdict import newest_step
        from trainer.distributed import World
        from trainer.loop.start_checks import check_start
        from trainer.loop.switches import check_not_stopped

        plan = check_start(config, World(rank=0, local_rank=0, size=world_size, local_size=local_size))
        for note in plan.notes:  # what `parallel.elastic` chose belongs in the job's own log
            print(note, file=sys.stderr)
        last = config.train.stop_at_step or config.train.max_steps
        done = plan.checkpoint is not None and newest_step(Path(config.run_dir)) >= last
        if not done:
            check_not_stopped(Path(config.run_dir))
    print(Path(config.run_dir).resolve(), config.data.images, *["done"] * done, sep="\n")


def check_nodes(config: TrainConfig, bad_nodes: Path | None) -> None:
    """Examine all nodes together; the main process prints what it found and exits with code 1 if it is not sound."""
    import torch

    from trainer.cluster.examination import examine, show
    from trainer.cluster.incidents import recording
    from trainer.distributed import detect_world
    from trainer.loop.start_checks import check_start
    from trainer.plan.job import Job, Layout, configured_layout

    start = time.perf_counter()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    world = detect_world()

    def check_run() -> tuple[Job, Layout]:
        """The checks of a start, and a sample read; returns what the planner counts the run's memory from."""
        plan = check_start(config, world)
        plan.dataset.read(world.rank % len(plan.dataset))
        zero = plan.deepspeed_config["zero_optimization"]
        job = Job(config=plan.config, shape=plan.model_shape, text_tokens=plan.dataset.info.max_tokens, zero=zero)
        return job, configured_layout(plan.config, world.size, plan.topology.zero_stage)[0]

    with recording(world.rank):
        facts, network, health = examine(config, world, check_run)
    if health is None:
        return
    show(facts, network, health, time.perf_counter() - start)
    sys.stdout.flush()
    if bad_nodes is not None:
        with replacing(bad_nodes) as temporary:
            temporary.write_text("".join(f"{node} {words}\n" for node, words in health.bad.items()))
    if not health.is_sound:
        raise SystemExit(1)


@command
def main(argv: list[str] | None = None) -> None:
    """Command line of the doctor."""
    parser = command_parser("trainer.doctor", __doc__)
    parser.add_argument("config", help="YAML recipe, or its name in trainer/configs")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--bad-nodes", type=Path, metavar="FILE")
    parser.add_argument("--only-config", action="store_true")
    parser.add_argument("--world-size", type=int, default=0, metavar="N", help="with --only-config: processes")
    parser.add_argument("--local-size", type=int, default=0, metavar="N", help="of them on each node")
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    if args.only_config:
        check_config(config, args.world_size, args.local_size)
    else:
        check_nodes(config, args.bad_nodes)


if __name__ == "__main__":
    main()
