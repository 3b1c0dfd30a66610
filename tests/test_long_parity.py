"""The comparison of long trainings: how it counts places that went to another token, and that it replays choices."""

import pytest
import torch
from tests_launcher import Launcher
from torch import Tensor, nn

from benchmarks.long_parity import Choices, Swap, Watcher, loss_differences, swaps
from moe.config import MoeConfig
from moe.layer import MoeLayer

PLACE = (0, "mlp", 7)


def test_swaps_pair_tokens_that_left_with_those_that_came() -> None:
    """Expert 0 keeps its tokens; expert 1 loses tokens 2 and 3 to 0 and 4, the closest of them first."""
    affinity_SE = torch.tensor([[0.5, 0.30], [0.4, 0.9], [0.1, 0.33], [0.2, 0.35], [0.3, 0.32]])
    plain = Choices({PLACE: torch.tensor([[0, 1, 4], [1, 2, 3]])}, {PLACE: affinity_SE}, [2.0, 1.0])
    moved_SE = affinity_SE + torch.tensor([[0.0, 0.05], [0, 0], [0, 0], [0, 0], [0, 0.02]])
    other = Choices({PLACE: torch.tensor([[4, 1, 0], [0, 1, 4]])}, {PLACE: moved_SE}, [2.0, 1.1])
    first, second = swaps(plain, other)
    assert (first.place, first.expert, second.expert) == (PLACE, 1, 1)
    assert (first.gap, first.shift) == pytest.approx((0.01, 0.02), abs=1e-6)  # 2 out, 4 in
    assert (second.gap, second.shift) == pytest.approx((0.05, 0.05), abs=1e-6)  # 3 out, 0 in
    assert swaps(plain, plain) == [] and isinstance(first, Swap)
    assert loss_differences(plain, other) == pytest.approx([0.0, 0.1])


def layer_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Sequential(MoeLayer(MoeConfig(num_experts=4), dim=8, hidden_dim=16))
    for parameter in layers.parameters():
        nn.init.normal_(parameter)
    return layers


def watched(layers: nn.Sequential, x_BSD: Tensor, samples: list[int], replayed: Choices | None) -> Choices:
    watcher = Watcher(layers, replayed)
    watcher.step, watcher.samples = 3, torch.tensor(samples)
    layers[0](x_BSD, None, x_BSD, x_BSD[:, 0])
    return watcher.found


def test_a_replayed_choice_is_that_of_the_other_training_for_the_same_samples() -> None:
    x_BSD = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))
    plain, own = (watched(layer_of(seed), x_BSD, [5, 6, 7], None) for seed in (0, 1))
    assert plain.index.keys() == {(3, "0", sample) for sample in (5, 6, 7)} == plain.affinity.keys()
    assert swaps(plain, own), "two layers that choose differently"
    turned = watched(layer_of(1), x_BSD[[2, 0]], [7, 5], plain)
    assert turned.index.keys() == {(3, "0", 7), (3, "0", 5)}
    assert all(torch.equal(index, plain.index[place]) for place, index in turned.index.items())
    for place, affinity_SE in turned.affinity.items():
        torch.testing.assert_close(affinity_SE, own.affinity[place])


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--replay"]], ids=["free", "replay"])
def test_trainings_stay_together_while_choices_are_equal(launcher: Launcher, options: list[str]) -> None:
    command = ["-m", "benchmarks.long_parity", "--steps", "8", "--window", "4", *options]
    done = launcher.run(*command, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith(("| 1-4", "| 5-8"))]
    assert len(lines) == 2
    for _, loss, swapped, gap in lines:
        assert float(loss) <= 1e-6 and swapped == "0 of 32768" and gap == "- |"
