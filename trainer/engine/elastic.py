"""Fits a recipe to the number of processes that it is started with: `ep_size` and batch arithmetic by rule.

With `parallel.elastic=true` a recipe states wishes, and each start may have another number of nodes:

- `ep_size` stays as the recipe has it if it divides the number of processes. Otherwise it becomes the largest divisor
  of `moe.num_experts` below it that divides that number and keeps each expert group inside a node; if only 1
  does, the largest that spans nodes.
- The global batch of the newest checkpoint stays. `micro_batch_size` becomes the largest divisor of a process's share
  that is not above the recipe's, `gradient_accumulation_steps` the rest. Where experts choose among several images,
  it holds whole pools: `moe.pool=group(n)` keeps it a multiple of n, `moe.pool=batch` keeps it as it is.

Neither changes what is computed beyond rounding. Expert groups are consecutive ranks, of which nodes hold
`local_size` each.
"""

from dataclasses import replace

from trainer.config import ConfigError, TrainConfig, require


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def choose_ep_size(wish: int, *, num_experts: int, world_size: int, local_size: int) -> int:
    """The `ep_size` of a start; `local_size` is the number of processes on each node."""
    if world_size % wish == 0:
        return wish
    fitting = [d for d in divisors(num_experts) if d < wish and world_size % d == 0]
    inside = [d for d in fitting if local_size % d == 0]
    return max(inside) if max(inside) > 1 else max(fitting)


def split_share(share: int, largest: int, pool: int = 1) -> tuple[int, int] | None:
    """Micro-batch size and accumulation steps whose product is a process's `share` of the global batch.

    The micro-batch is a multiple of `pool` images; None if no such one divides the share.
    """
    fitting = [d for d in divisors(share) if d <= largest and d % pool == 0]
    return (fitting[-1], share // fitting[-1]) if fitting else None


def adapt(
    config: TrainConfig, *, world_size: int, local_size: int, saved_batch: int | None
) -> tuple[TrainConfig, list[str]]:
    """The configuration of this start and a sentence for each setting that the rule changed.

    `saved_batch` is the global batch of the checkpoint to resume from (None: a fresh run keeps the recipe's).
    Raises ConfigError when the processes cannot share it equally.
    """
    wish, loop = config.parallel.ep_size, config.train
    ep_size = choose_ep_size(
        wish, num_experts=config.moe.num_experts, world_size=world_size, local_size=local_size or world_size
    )
    notes = []
    if ep_size != wish:
        where = "inside a node" if (local_size or world_size) % ep_size == 0 else "across nodes"
        notes.append(
            f"elastic: parallel.ep_size {wish} -> {ep_size}, the largest that divides {world_size} processes and "
            f"{config.moe.num_experts} experts, {where}"
        )
        config = replace(config, parallel=replace(config.parallel, ep_size=ep_size))
    if saved_batch is None or config.global_batch_size(world_size) == saved_batch:
        return config, notes
    sharing = divisors(saved_batch)
    nearest = [d for d in sharing if d < world_size][-1:] + [d for d in sharing if d > world_size][:1]
    require(
        world_size in sharing,
        f"parallel.elastic: {world_size} processes cannot share the run's global batch of {saved_batch}: start "
        f"{' or '.join(map(str, nearest))} of them",
    )
    pool = (config.moe.group_size or loop.micro_batch_size) if config.moe.every else 1
    split = split_share(saved_batch // world_size, loop.micro_batch_size, pool)
    if split is None:
        raise ConfigError(
            f"moe.pool={config.moe.pool} and parallel.elastic: {world_size} processes with {saved_batch // world_size} "
            f"images each cannot hold whole pools of {pool}: start a number of processes that leaves each a multiple "
            "of it"
        )
    micro, steps = split
    notes.append(
        f"elastic: global batch {saved_batch} on {world_size} processes: train.micro_batch_size "
        f"{loop.micro_batch_size} -> {micro}, train.gradient_accumulation_steps "
        f"{loop.gradient_accumulation_steps} -> {steps}"
    )
    loop = replace(loop, micro_batch_size=micro, gradient_accumulation_steps=steps)
    return replace(config, train=loop), notes
