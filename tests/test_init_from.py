"""Starting from an export: equal losses on any topology, dense to mixture without a change, clear refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import model_tensors, write_checkpoint
from tests_launcher import Launcher

from benchmarks.parity import VARIANTS
from moe.config import MoeConfig
from trainer.checkpoint.export import ExportOptions, export
from trainer.checkpoint.export_reader import ExportReader, read_export
from trainer.checkpoint.init_from import check_init, init_notes
from trainer.checkpoint.upcycle import Upcycled
from trainer.config import ConfigError, TrainConfig, load_config
from trainer.data.latents.samples import LatentInfo
from trainer.data.synthetic import SyntheticDataset
from trainer.diffusion.model import EcDit, ModelShape

TINY = [
    "model.dim=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "data.image_size=8",
    "moe.num_experts=4", "train.max_steps=1", "optim.warmup_steps=0",
]  # fmt: skip
UPCYCLED = ["moe.every=2", "moe.tie_break=rotate"]
INFO = SyntheticDataset(8, 0).info


def make_export(folder: Path, *overrides: str) -> Path:
    """An fp32 export of random weights that are nowhere zero."""
    config = load_config("debug", [*TINY, *overrides])
    checkpoint = write_checkpoint(folder / "run", config, INFO, {"ema": model_tensors(config, INFO)})
    export(checkpoint, folder / "out", ExportOptions(weights="ema", dtype="fp32", shard_bytes=20_000))
    return folder / "out"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("dense"), "moe.every=0")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("mixture"))


def model_of(config: TrainConfig, weights: dict[str, torch.Tensor]) -> EcDit:
    shape = ModelShape.of(INFO)
    model = EcDit(config.model, config.moe, shape)
    model.load_state_dict(weights)
    return model


def read_in_pieces(source: Upcycled, name: str, length: int) -> torch.Tensor:
    """A tensor put together from ranges of `length` elements, as ranks read them."""
    out = torch.full(source.shapes[name], torch.nan)
    for start in range(0, out.numel(), length):
        source.read_into(name, start, out.view(-1)[start : start + length])
    return out


@pytest.mark.parametrize(
    "num_experts,factor,kept", [(4, 2.0, 16), (8, 3.0, 16), (6, 3.0, 16), (16, 1.0, 16), (1, 1.0, 16), (8, 2.0, 8)]
)
@pytest.mark.parametrize("length", [37, 100_000])
def test_a_mixture_of_copies_equals_the_dense_model(
    dense: Path, num_experts: int, factor: float, kept: int, length: int
) -> None:
    """Against the dense model itself, for whole and masked pictures, weights read in pieces of any length."""
    moe = MoeConfig(num_experts=num_experts, capacity_factor=factor, tie_break="rotate")
    config = load_config("debug", [*TINY, "moe.every=0"])
    reader = ExportReader(dense)
    source = Upcycled(reader, moe)
    weights = {name: read_in_pieces(source, name, length) for name in source.shapes}
    models = [model_of(config, read_export(dense)), model_of(replace(config, moe=moe), weights)]
    reader.close()
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, 3, 8, 8, generator=generator), torch.rand(3, generator=generator)
    text = torch.randn(3, 5, INFO.text_dim, generator=generator)
    keep = torch.stack([torch.randperm(16, generator=generator)[:kept].sort().values for _ in range(3)])
    outputs = [m(x, t, text, torch.ones(3, 5, dtype=torch.bool), keep if kept < 16 else None) for m in models]
    expected, got = outputs[0][0], outputs[1][0]
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    (routed,) = outputs[1][1]
    assert (routed.statistics().experts_per_token_BS == int(factor)).all()


@pytest.mark.parametrize("router", VARIANTS)
def test_exports_have_what_routers_learn(router: str, tmp_path: Path) -> None:
    settings = [f"moe.{key}={value}" for key, value in VARIANTS[router].items()]
    folder = make_export(tmp_path, *settings)
    config = load_config("debug", [*TINY, *settings])
    model_of(config, read_export(folder))  # strict: every parameter of this router, and no other
    check_init(folder, config, INFO)


def test_copies_part_ways_at_the_first_step(dense: Path) -> None:
    """The gradient of the zero router and those of the experts differ between experts."""
    config = load_config("debug", [*TINY, *UPCYCLED])
    reader = ExportReader(dense)
    source = Upcycled(reader, config.moe)
    model = model_of(config, {name: read_in_pieces(source, name, 1000) for name in source.shapes})
    reader.close()
    out, _ = model(torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool))
    out.square().mean().backward()
    for name in ("router.weight", "experts.w1", "experts.w2"):
        gradient = model.get_parameter(f"blocks.1.mlp.{name}").grad
        assert gradient is not None and gradient.flatten(1).norm(dim=1).min() > 0
        assert all((gradient[i] - gradient[j]).norm() > 1e-6 for i in range(4) for j in range(i))


@pytest.mark.parametrize(
    "kind,overrides,words",
    [
        ("mixture", ["model.dim=32"], "model.dim is 32 but init_from=.* was trained with 16: set model.dim=16"),
        ("mixture", ["model.prediction=data"], "model.prediction is data but .* with velocity: set model.prediction="),
        ("mixture", ["moe.every=0"], "moe.every is 0 but .* was trained with 2: experts stay in their blocks"),
        ("mixture", ["moe.every=1"], "moe.every is 1 but .* was trained with 2: experts stay in their blocks"),
        ("mixture", ["moe.num_experts=8"], "moe.num_experts is 8 but .* with 4: .* so set moe.num_experts=4 or use"),
        (
            "dense",
            ["moe.tie_break=rotate", "moe.gate=sigmoid"],
            "moe.gate is sigmoid but .* of a dense model, .* raw softmax gates .*: set moe.gate=softmax",
        ),
        ("dense", [], "moe.tie_break is any but .* of a dense model, .*: set moe.tie_break=rotate"),
        ("dense", ["moe.tie_break=rotate", "moe.capacity_factor=1.5"], "capacity_factor is 1.5 .* use a whole number"),
        ("dense", ["moe.tie_break=rotate", "moe.num_experts=6"], "moe.num_experts is 6 but .* use a divisor of .* 32"),
        ("dense", ["moe.tie_break=rotate", "moe.capacity_factor=4"], "stay equal: use more than .*=4 and at most 16"),
        ("dense", ["moe.tie_break=rotate", "moe.num_experts=32"], "stay equal: use more than .*=2 and at most 16"),
        (
            "dense",
            ["moe.tie_break=rotate", "moe.num_experts=4", "moe.capacity_factor=3", "diffusion.mask_ratio=0.375"],
            r"moe.num_experts is 4 but .* use a divisor of moe.capacity_factor \* 10 tokens = 30",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    request: pytest.FixtureRequest, kind: str, overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        check_init(request.getfixturevalue(kind), load_config("debug", [*TINY, *overrides]), INFO)
    assert "\n" not in str(error.value)


def test_other_data_and_broken_exports_are_named(dense: Path, mixture: Path, tmp_path: Path) -> None:
    config = load_config("debug", TINY)
    check_init(mixture, config, INFO)
    check_init(dense, load_config("debug", [*TINY, *UPCYCLED]), INFO)
    for change, words in (
        (
            {"channels": 4, "mean": [0.0] * 4, "std": [1.0] * 4},
            "the data's channels is 4 but init_from=.* was trained with 3",
        ),
        ({"text_encoder": "minilm"}, "data.text_encoder is minilm but init_from=.* was trained with : encode"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_init(mixture, config, LatentInfo(**vars(INFO) | change))
    with pytest.raises(ConfigError, match=r"init_from=.* is not an export: make one with"):
        check_init(mixture.parent / "run", config, INFO)
    bigger = LatentInfo(**vars(INFO) | {"height": 16, "width": 16})
    check_init(mixture, config, bigger)
    assert "height since the export: 8 -> 16" in init_notes(replace(config, init_from=str(mixture)), bigger, None)
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in mixture.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[: -1 if "00002" in path.name else None])
    with pytest.raises(ConfigError, match=r"is not whole: model-00002-of-.* bytes instead of .*: export it anew"):
        check_init(broken, config, INFO)


def started(launcher: Launcher, run_dir: Path, *overrides: str, processes: int = 1) -> dict[str, Any]:
    """The first line of metrics of a run."""
    done = launcher.run(
        "-m", "trainer.train", "debug", *TINY, f"run_dir={run_dir}", *overrides, processes=processes
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first: dict[str, Any] = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])
    return first


@pytest.mark.slow
def test_first_losses_are_equal_on_any_topology_dense_and_mixture(
    launcher: Launcher, dense: Path, tmp_path: Path
) -> None:
    stage2 = "parallel.deepspeed_config=ds_configs/zero2.json"
    init = f"init_from={dense}"
    plain = started(launcher, tmp_path / "plain", init, "moe.every=0", stage2)
    one = started(launcher, tmp_path / "one", init, *UPCYCLED, stage2)
    two = started(
        launcher, tmp_path / "two", init, *UPCYCLED, "parallel.ep_size=2", "train.micro_batch_size=4", processes=2
    )
    assert one["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert two["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert one["moe/1/coverage_2"] == two["moe/1/coverage_2"] == 1
    log = (tmp_path / "two/train.log").read_text()
    assert f"starting from the weights of {dense}" in log
    assert "each of 4 experts is the dense FFN with its output times 2" in log
    again = launcher.run("-m", "trainer.train", "debug", *TINY, *UPCYCLED, stage2, f"run_dir={tmp_path / 'one'}",
                         "init_from=gone", "train.max_steps=2")  # fmt: skip
    assert again.returncode == 0, again.stderr[-3000:]
    log = (tmp_path / "one/train.log").read_text()
    assert "init_from=gone is ignored: the run goes on from its own checkpoint" in log
    assert len((tmp_path / "one/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_refused_export_leaves_no_run_folder(launcher: Launcher, mixture: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = launcher.run(
        "-m", "trainer.train", "debug", *TINY, f"run_dir={run_dir}", f"init_from={mixture}", "moe.num_experts=8"
    )
    assert done.returncode == 2 and "moe.num_experts is 8 but init_from=" in done.stderr
    assert not run_dir.exists()
    broken = tmp_path / "broken"
    shutil.copytree(mixture, broken)
    file = next(broken.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = launcher.run("-m", "trainer.train", "debug", *TINY, f"run_dir={run_dir}", f"init_from={broken}")
    assert done.returncode == 2 and f"{file.name} has a wrong checksum: export it anew" in done.stderr
    assert not (run_dir / "config.yaml").exists()
