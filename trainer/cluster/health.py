"""Judges what the processes of a job found out: problems of nodes, problems of all, and the table that shows them."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.cluster.facts import Facts
from trainer.cluster.network import BROKEN, Network, slow_nodes

MAX_CLOCK_SKEW = 5.0  # seconds: the time limit is the controller's clock, and logs of nodes are read side by side


@dataclass(frozen=True, kw_only=True)
class Health:
    """`bad` maps a node to what is wrong with it; `general` is wrong on all nodes; `warnings` do not stop a start."""

    bad: dict[str, str]
    general: list[str]
    warnings: list[str]

    @property
    def is_sound(self) -> bool:
        """Whether training may start."""
        return not self.bad and not self.general

    def sentences(self) -> list[str]:
        """What to fix, one sentence each."""
        return [f"fix: {words}" for words in (*self.general, *(f"node {n}: {w}" for n, w in self.bad.items()))]


def nodes_of(facts: Sequence[Facts]) -> list[str]:
    """Names of the nodes in the order of their ranks."""
    return list(dict.fromkeys(fact.node for fact in sorted(facts, key=lambda fact: fact.rank)))


def warnings_of(facts: Sequence[Facts]) -> list[str]:
    """The warnings of all processes, each sentence once."""
    return list(dict.fromkeys(words for fact in facts for words in fact.warnings))


def judge_nodes(facts: Sequence[Facts], missing: Mapping[int, str]) -> Health:
    """Judge before any collective: each node by itself, and versions side by side.

    `missing` maps ranks that did not report to their nodes. A problem that all of several nodes have is `general`.
    """
    by_node: dict[str, list[str]] = {node: [] for node in nodes_of(facts)}
    for fact in facts:
        by_node[fact.node] += fact.problems
    spread = Counter(words for problems in by_node.values() for words in set(problems))
    general = [words for words, count in spread.items() if count == len(by_node)]
    bad = {node: "; ".join(dict.fromkeys(w for w in words if w not in general)) for node, words in by_node.items()}
    for rank, node in missing.items():
        bad[node] = f"process {rank} did not report in time: see its log"
    for name in sorted({name for fact in facts for name in fact.versions}):
        found = [fact.versions.get(name, "none") for fact in facts]
        usual = Counter(found).most_common(1)[0][0]
        for fact, mine in zip(facts, found, strict=True):
            if mine != usual:
                bad[fact.node] = bad.get(fact.node) or f"{name} is {mine}, elsewhere {usual}: install the same"
    bad = {node: words for node, words in bad.items() if words}
    return Health(bad=bad, general=general, warnings=warnings_of(facts))


def judge_network(facts: Sequence[Facts], network: Network) -> Health:
    """Judge the results of collectives, bandwidths and clocks."""
    nodes, bad, warnings = nodes_of(facts), dict[str, str](), warnings_of(facts)
    for number, share in slow_nodes(network.pair).items():
        words = f"its network has {share:.0%} of the median node's bandwidth: check its links"
        if share < BROKEN:
            bad[nodes[number]] = words
        else:
            warnings.append(f"node {nodes[number]}: {words}")
    middle = statistics.median(network.clock)
    for fact in facts:
        if abs(skew := network.clock[fact.rank] - middle) > MAX_CLOCK_SKEW:
            bad[fact.node] = f"its clock is {skew:+.1f} s off the others': synchronise it"
    return Health(bad=bad, general=network.wrong, warnings=warnings)


def table(facts: Sequence[Facts], network: Network | None, health: Health) -> list[str]:
    """One line per node."""
    rows = [
        ("node", "ranks", "device", "driver", "bound", "free", "memory", "disk", "write", "clock", "pairs", "state"),
        ("", "", "", "", "", "GiB", "GiB", "GiB", "MiB/s", "s", "GB/s", ""),
    ]
    middle = statistics.median(network.clock) if network else 0.0
    for number, node in enumerate(nodes_of(facts)):
        mine = [fact for fact in facts if fact.node == node]
        ranks = [fact.rank for fact in mine]
        devices = ", ".join(f"{count} x {name}" for name, count in Counter(fact.device for fact in mine).items())
        free = f"{min(fact.device_free for fact in mine):.0f}" if mine[0].device_free else "-"
        bound = "; ".join(dict.fromkeys(fact.bound for fact in mine))
        of_node = (max(getattr(fact, key) for fact in mine) for key in ("memory", "disk_free", "write_speed"))
        clock = f"{network.clock[ranks[0]] - middle:+.2f}" if network else "-"
        pairs = network.pair.get(number) if network else None
        speed = f"{statistics.median(pairs.values()):.2f}" if pairs else "-"
        state = "bad" if node in health.bad else "ok"
        memory, disk, write = (f"{value:.0f}" for value in of_node)
        rows.append((node, f"{min(ranks)}-{max(ranks)}", devices, mine[0].driver or "-", bound, free,
                     memory, disk, write, clock, speed, state))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
