"""Examines the nodes of a job together: facts of each process, then the network between them.

Facts travel through a key-value store, so that a process that is missing is named; a node that is known to be
broken is named before a collective with it could hang.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from trainer.cluster.facts import Facts, gather_facts
from trainer.cluster.health import Health, judge_network, judge_nodes, table
from trainer.cluster.network import Network, measure
from trainer.config import ConfigError, TrainConfig
from trainer.distributed import World
from trainer.plan.job import Job, Layout

REPORT_SECONDS = 60.0
HOSTS = "NODE_NAMES"  # names of the job's nodes in the order of ranks, so that one that is missing has a name


def open_store(world: World) -> TCPStore:
    """The store that the main process serves; ConfigError on a process that cannot serve or reach it."""
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
    timeout = timedelta(seconds=REPORT_SECONDS)
    try:
        return TCPStore(address, port, world.size, world.is_main, timeout, wait_for_workers=False)
    except (RuntimeError, dist.DistError) as error:
        what = f"port {port} is taken: use another MASTER_PORT" if world.is_main else "is its node up, its port open?"
        raise ConfigError(f"process 0 cannot be reached at {address}:{port}, {what} ({error})") from error


def collect(store: TCPStore, world: World) -> tuple[list[Facts], dict[int, str]]:
    """On the main process: the facts of all, and the nodes of those that did not report in time."""
    hosts, end = os.environ.get(HOSTS, "").split(), time.monotonic() + REPORT_SECONDS
    facts, missing = [], {}
    for rank in range(world.size):
        key = f"facts/{rank}"
        try:
            store.wait([key], timedelta(seconds=max(0.1, end - time.monotonic())))
            facts.append(Facts(**json.loads(store.get(key))))
        except (RuntimeError, dist.DistError):  # the time is over
            number = rank // (world.local_size or world.size)
            missing[rank] = hosts[number] if number < len(hosts) else f"of process {rank}"
    return facts, missing


def examine(
    config: TrainConfig, world: World, check_run: Callable[[], tuple[Job, Layout]]
) -> tuple[list[Facts], Network | None, Health | None]:
    """Facts, network and health; facts and health on the main process only, the network if all nodes are sound.

    `check_run` is what `gather_facts` asks about the run itself. Collective.
    """
    # First what needs no network: a node with a broken device would let the others hang in a collective.
    store = open_store(world)
    mine = gather_facts(config, world, check_run)
    store.set(f"facts/{world.rank}", json.dumps(asdict(mine)))
    facts: list[Facts] = []
    health: Health | None = None
    if world.is_main:
        facts, missing = collect(store, world)
        health = judge_nodes(facts, missing)
        store.set("sound", "yes" if health.is_sound else "no")
    # All learn the verdict from the store, which waits longer for the main process than that waits for the others.
    store.set_timeout(timedelta(seconds=2 * REPORT_SECONDS))
    sound = store.get("sound") == b"yes"
    store.set(f"told/{world.rank}", "")
    if not sound or world.size == 1:
        if world.is_main:  # it serves the store, so it must end last
            store.wait([f"told/{fact.rank}" for fact in facts])
        return facts, None, health
    network = _measure_network(store, world)
    if health is not None:
        health = judge_network(facts, network)
    return facts, network, health


def _measure_network(store: TCPStore, world: World) -> Network:
    """All-reduce, all-to-all and bandwidths in a process group that ends with the call. Collective."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", world.local_rank) if cuda else torch.device("cpu")
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=PrefixStore("group", store), rank=world.rank, world_size=world.size,
        timeout=timedelta(seconds=REPORT_SECONDS), device_id=device if cuda else None,
    )  # fmt: skip
    network = measure(world.rank, world.size, world.local_size or world.size, device)
    dist.barrier()
    dist.destroy_process_group()
    return network


def show(facts: list[Facts], network: Network | None, health: Health, seconds: float) -> None:
    """Print the table of nodes, the bandwidths and the findings."""
    print("\n".join(table(facts, network, health)))
    if network is not None:
        print(f"all-reduce {network.all_reduce:.2f} GB/s, all-to-all {network.all_to_all:.2f} GB/s per process")
    for sentence in (*(f"warning: {words}" for words in health.warnings), *health.sentences()):
        print(sentence)
    print(f"{'sound' if health.is_sound else 'not sound'}, checked {len(facts)} processes in {seconds:.1f} s")
