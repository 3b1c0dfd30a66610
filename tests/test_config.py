"""Settings: strict merging, one-sentence errors, and nothing written before all checks have passed."""

import json
from pathlib import Path

import pytest

from trainer.config import ConfigError, config_from_dict, config_to_dict, load_config, run_cli, save_config
from trainer.data.dataset import open_dataset
from trainer.distributed import World
from trainer.engine.deepspeed_config import DEFAULT_LIVE, load_deepspeed_config
from trainer.loop.start_checks import check_start, rounded_capacities
from trainer.train import main


@pytest.mark.parametrize(
    "override,words",
    [
        ("train.micro_bach_size=3", "did you mean train.micro_batch_size"),
        ("train.max_steps=abc", "train.max_steps"),
        ("train.max_steps=0", "train.max_steps is 0: use 1 or more"),
        ("train=3", "train is 3: it is a section"),
        ("parallel.ep_size=3", "parallel.ep_size=3 does not divide moe.num_experts=8"),
        ("moe.capacity_factor=99", "moe.capacity_factor is 99"),
        ("train.precision=fp8", "train.precision"),
        ("model.num_heads=5", "model.num_heads=5 does not divide model.dim=64"),
        ("nonsense", "is not of the form key=value"),
        ("moe.pool=world", "moe.pool is world: use image, batch or group(n)"),
        ("moe.pool=group(0)", "moe.pool is group(0)"),
        ("moe.pool=group(3)", "moe.pool=group(3) and train.micro_batch_size=8"),
        ("moe.pool=group(16)", "moe.pool=group(16) and train.micro_batch_size=8: a pool lies within one rank's"),
        ("moe.router=hash", "moe.router"),
        ("diffusion.unmask_at_step=5", "diffusion.unmask_at_step=5 ends the masking, but diffusion.mask_ratio=0"),
        ("diffusion.unmask_at_step=-1", "diffusion.unmask_at_step is -1"),
        ("train.max_bad_steps=0", "train.max_bad_steps is 0: use 1 or more"),
        ("train.max_rollbacks=-1", "train.max_rollbacks is -1: use 0 or more"),
        ("train.emergency_save_seconds=0", "train.emergency_save_seconds is 0"),
    ],
)
def test_bad_overrides_name_setting_value_and_remedy(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("debug", [override])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides,words",
    [
        (["router=token_choice", "top_k=9"], "moe.top_k is 9: use 1 to moe.num_experts=8"),
        (["router=token_choice", "gate=identity"], "moe.gate=identity has negative gates, whose sum moe.router=token_"),
        (["normalize_gates=true", "gate=identity"], "whose sum moe.normalize_gates=true would divide by"),
        (
            ["router=diffmoe"],
            "moe.router=diffmoe learns how much compute a picture deserves among others, but moe.pool",
        ),
        (["router=expert_race", "tie_break=rotate"], "moe.tie_break=rotate is for moe.router=expert_choice"),
        (["capacity_factor_start=4"], "moe.capacity_factor_start=4 and moe.capacity_anneal_steps=0 belong together"),
        (["capacity_factor_start=1", "capacity_anneal_steps=9"], "it falls to moe.capacity_factor=2, so use that or"),
        (["capacity_anneal_steps=-1"], "moe.capacity_anneal_steps is -1"),
        (["num_shared_experts=-1"], "moe.num_shared_experts is -1"),
        (["gate_scale=0"], "moe.gate_scale is 0"),
        (["auxiliary_weight=-1"], "moe.auxiliary_weight is -1"),
    ],
)
def test_routers_that_contradict_a_setting_name_both(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("debug", [f"moe.{item}" for item in overrides])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_unknown_key_in_a_recipe_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("train: {max_step: 3}\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: unknown key train.max_step; did you mean train.max_steps"):
        load_config(recipe)


def test_what_is_no_yaml_is_refused_in_one_sentence(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    for content, words in (("train: [1,\nseed: }\n", "line 2"), ("seed: 1\nseed: 2\n", "found duplicate key seed")):
        recipe.write_text(content)
        with pytest.raises(ConfigError, match=f"^mine.yaml: .*{words}") as error:
            load_config(recipe)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"^override 'train.max_steps=\[}': "):
        load_config("debug", ["train.max_steps=[}"])


def test_a_saved_config_that_is_wrong_is_refused() -> None:
    content = config_to_dict(load_config("debug"))
    with pytest.raises(ConfigError, match=r"moe.num_experts is 0: use 1 or more"):
        config_from_dict(content | {"moe": {"num_experts": 0}})
    with pytest.raises(ConfigError, match=r"saved config: unknown key moe.num_expert; did you mean moe.num_experts"):
        config_from_dict(content | {"moe": {"num_expert": 4}})


def test_saved_config_loads_equal(tmp_path: Path) -> None:
    config = load_config("debug", ["optim.learning_rate=3e-4", "sample.prompts=[a cat, a dog]"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def deepspeed_json(tmp_path: Path, **changes: object) -> str:
    content = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True} | changes
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    return f"parallel.deepspeed_config={path}"


def test_auto_values_are_filled(tmp_path: Path) -> None:
    override = deepspeed_json(tmp_path, train_batch_size="auto", bf16={"enabled": "auto"})
    config = load_config("debug", [override, "train.gradient_accumulation_steps=3", "train.precision=bf16"])
    content = load_deepspeed_config(config, 4)
    assert content["train_batch_size"] == 8 * 3 * 4
    assert content["gradient_accumulation_steps"] == 3
    assert content["bf16"] == {"enabled": True}
    assert content["gradient_clipping"] == 1.0
    assert content["data_types"] == {"grad_accum_dtype": "fp32"}  # several micro-batches
    alone = load_config("debug", [deepspeed_json(tmp_path), "train.precision=bf16"])
    assert load_deepspeed_config(alone, 1)["data_types"] == {"grad_accum_dtype": "bf16"}


def test_a_whole_block_is_gathered_ahead(tmp_path: Path) -> None:
    """Of the experts a rank's own; a number in the file stands, and what is live has room for two blocks."""
    names = "stage3_prefetch_bucket_size", "stage3_max_live_parameters"

    def filled(ep_size: int, *overrides: str, **given: object) -> list[int]:
        override = deepspeed_json(tmp_path, zero_optimization={"stage": 3} | dict.fromkeys(names, "auto") | given)
        config = load_config("debug", [override, f"parallel.ep_size={ep_size}", *overrides])
        content = load_deepspeed_config(config, 8)["zero_optimization"]
        return [content[name] for name in names]

    dim, hidden, num_experts = 64, 256, 8
    attention = 2 * (2 * dim * dim + 2 * dim * dim // 2 + 2 * dim // 4)  # query and out, key and value, two norms
    rest, expert = attention + 6 * dim, 2 * dim * hidden + dim + hidden
    assert filled(1) == [rest + num_experts * dim + 8 * expert, DEFAULT_LIVE]
    assert filled(4) == [rest + num_experts * dim + 2 * expert, DEFAULT_LIVE]
    assert filled(1, "moe.every=0") == [rest + expert, DEFAULT_LIVE]
    assert filled(1, stage3_prefetch_bucket_size=7) == [7, DEFAULT_LIVE]
    block, live = filled(1, "model.dim=8192")
    assert block > DEFAULT_LIVE and live == 2 * block


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"train_batch_size": 7}, "train_batch_size is 7 but train.micro_batch_size"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5 but optim.max_grad_norm gives 1.0"),
        ({"optimizer": {"type": "Adam"}}, "optimizer belongs in the YAML"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler belongs in the YAML"),
        ({"comms_logger": {"x": "auto"}}, 'comms_logger.x is "auto"'),
        ({"zero_optimisation": {"stage": 2}}, "unknown key zero_optimisation; did you mean zero_optimization?"),
        ({"colour": 1}, "unknown key colour; DeepSpeed has no such setting, so remove it"),
        ({"bf16": True}, "bf16 is True: it is a section with keys of its own"),
        ({"data_types": {"grad_accum_dtype": "fp64"}}, "data_types.grad_accum_dtype is 'fp64': with train.precision="),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "train.precision=fp32 use fp32, or"),
        ({"zero_optimization": {"stage": 2, "stge": 1}}, "zero_optimization.stge is 1: Extra inputs are not"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, "zero_optimization.reduce_bucket_size is -1"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0: use 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "device is 'nvme'"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio is 0.5"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm is off"),
        ({"bf16": {"enabled": "auto", "check_grad_overflow": False}}, "bf16.check_grad_overflow is off"),
        ({"fp16": {"enabled": True}}, "fp16 is on"),
    ],
)
def test_contradictions_and_leftovers_are_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    config = load_config("debug", [deepspeed_json(tmp_path, **changes)])
    with pytest.raises(ConfigError) as error:
        load_deepspeed_config(config, 1)
    assert words in str(error.value)


def test_json_with_a_trailing_comma_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2},}')
    with pytest.raises(ConfigError, match="not strict JSON"):
        load_deepspeed_config(load_config("debug", [f"parallel.deepspeed_config={tmp_path / 'ds.json'}"]), 1)


@pytest.mark.parametrize(
    "overrides,world_size,words",
    [
        (["parallel.ep_size=2"], 1, "parallel.ep_size=2 does not divide the number of processes, 1"),
        (["moe.capacity_factor=0.01"], 1, "capacity below 1"),
        (["train.micro_batch_size=65"], 1, "the data set has 64 samples"),
        (["train.micro_batch_size=8", "train.gradient_accumulation_steps=5"], 2, "a global batch of 80"),
        (["model.patch_size=3"], 1, "model.patch_size=3 does not divide the latent of 32 x 32"),
        (["data.source=shards", "data.latents=nowhere"], 1, "data.latents=nowhere has no dataset.json"),
        (["train.sample_every=5"], 1, "sample.prompts is empty"),
        (["parallel.deepspeed_config=absent.json"], 1, "absent.json: no such file"),
        (["moe.num_expert=4"], 1, "did you mean moe.num_experts"),
    ],
)
def test_user_errors_exit_2_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    overrides: list[str], world_size: int, words: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    run_dir = tmp_path / "run"
    with pytest.raises(SystemExit) as error:
        main(["debug", f"run_dir={run_dir}", *overrides])
    message = capsys.readouterr().err
    assert error.value.code == 2
    assert words in message and message.startswith("error: ") and message.count("\n") == 1
    assert not run_dir.exists()


def test_rounded_capacities_are_told() -> None:
    overrides = ["moe.num_experts=48", "diffusion.mask_ratio=0.5"]
    config = load_config("debug", overrides)
    info = open_dataset(config).info
    assert list(rounded_capacities(config, info)) == [
        "expert capacity on 256 tokens is rounded down: 2.0 * 256 / 48 = 10.667, used 10",
        "expert capacity on 128 tokens is rounded down: 2.0 * 128 / 48 = 5.333, used 5",
    ]
    assert not list(rounded_capacities(load_config("debug"), info))
    assert not list(rounded_capacities(load_config("debug", [*overrides, "moe.every=0"]), info))


def test_a_folder_that_a_dead_job_left_before_its_first_write_is_new(tmp_path: Path) -> None:
    for name in ("run.lock", "run.lock.json", "config.yaml.tmp", ".config.yaml.7-ab.tmp"):
        (tmp_path / name).write_text("")
    config, world = load_config("debug", [f"run_dir={tmp_path}"]), World(rank=0, local_rank=0, size=1)
    assert check_start(config, world).checkpoint is None


def test_foreign_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(SystemExit) as error:
        main(["debug", f"run_dir={tmp_path}"])
    assert error.value.code == 2 and "is not the folder of a run" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_else_went_wrong_is_said_below_the_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> None:
        error = ConfigError("run_dir=x was removed")
        error.add_note("The checkpoint of step 3 could not be saved either")
        raise error

    with pytest.raises(SystemExit) as caught:
        run_cli(body)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said == "error: run_dir=x was removed\nThe checkpoint of step 3 could not be saved either\n"
