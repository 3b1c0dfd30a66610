"""The command line of checkpoints, the pieces of other topologies, and which settings may change at a resume."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_layout import layout_places, tensor_hashes
from checkpoint_samples import INFO, PARAMETERS, TOPOLOGY, sample_config, sample_tensor, write_sample

from moe.config import MoeConfig
from trainer.checkpoint.__main__ import main
from trainer.checkpoint.folder import fault
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.resume import RULES, check_resumable, compare_configs
from trainer.checkpoint.state import Topology, read_state
from trainer.config import ConfigError, OptimConfig, TrainConfig, config_to_dict


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert isinstance(error.value.code, int)
    return error.value.code, printed.out, printed.err


def test_list_and_verify_print_a_table_and_say_what_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write_sample(tmp_path, 10), write_sample(tmp_path, 200, Topology(world_size=2, ep_size=1, zero_stage=2))
    code, out, _ = run(capsys, "list", tmp_path)
    header, *rows = out.splitlines()
    assert code == 0 and header.split() == ["STEP", "SAVED", "SIZE", "TOPOLOGY", "STATE"]
    assert rows[0].startswith("10 ") and "4 processes, ep_size 2, ZeRO 3" in rows[0] and rows[0].endswith("whole")
    assert rows[1].startswith("200") and "2 processes, ep_size 1, ZeRO 2" in rows[1] and "2030-01-0" in rows[1]
    content = bytearray((bad / "rank_00001.safetensors").read_bytes())
    content[-1] ^= 1
    (bad / "rank_00001.safetensors").write_bytes(content)
    assert run(capsys, "list", tmp_path)[0] == 0, "a changed byte takes reading to find"
    code, out, _ = run(capsys, "verify", tmp_path)
    assert code == 1 and out.splitlines()[2].endswith("rank_00001.safetensors has a wrong checksum")
    assert run(capsys, "verify", good)[0] == 0 and run(capsys, "verify", bad)[0] == 1
    (bad / "state.json").unlink()
    code, out, _ = run(capsys, "list", tmp_path)
    assert code == 1 and out.splitlines()[2].split()[1:4] == ["-", "-", "-"]
    for path in (tmp_path / "absent", tmp_path.parent):
        code, _, err = run(capsys, "list", path)
        assert code == 2 and err.count("\n") == 1


TOPOLOGIES = [
    Topology(world_size=world, ep_size=ep, zero_stage=stage)
    for world, ep in ((1, 1), (2, 1), (3, 1), (4, 4), (8, 2), (16, 8))
    for stage in (2, 3)
]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_every_topology_holds_and_reads_the_same_tensors(tmp_path: Path, topology: Topology) -> None:
    """What one topology wrote has the full tensors of any other, and gives each rank of that the pieces it asks for."""
    source, other = write_sample(tmp_path / "run", 10), write_sample(tmp_path / "other", 10, topology)
    assert tensor_hashes(source) == tensor_hashes(other) and fault(other) == ""
    assert read_state(other).topology == topology
    readers = CheckpointReader(source), CheckpointReader(other)
    for kind in ("weight", "ema"):
        for entry in PARAMETERS:
            full = sample_tensor(kind, entry["name"], 10)
            assert all(reader.read(kind, entry["name"]).equal(full) for reader in readers)
        for place in (place for places in layout_places(PARAMETERS, topology) for place in places):
            part = sample_tensor(kind, place.name, 10).flatten()[place.offset : place.offset + place.length]
            assert readers[0].read_range(kind, place.name, place.offset, place.offset + place.length).equal(part)


def test_experts_go_to_consecutive_ranks() -> None:
    """Rank r of an expert group of 4 holds experts 2r and 2r+1 of 8; two groups share each of them."""
    ranks = layout_places(PARAMETERS, Topology(world_size=8, ep_size=4, zero_stage=3))
    for rank, places in enumerate(ranks):
        (place,) = (place for place in places if place.name == "mlp.experts.w1")
        first = 2 * (rank % 4) * 21
        assert place.offset == first + 21 * (rank // 4) and place.length == 21


def leaves(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_rule_is_of_a_setting() -> None:
    keys = list(leaves(config_to_dict(TrainConfig())))
    assert set(RULES) <= set(keys) | {key.partition(".")[0] for key in keys}, "no rule for what does not exist"


FROZEN = {
    "seed": "it keys the order of the data and all noise",
    "train.precision": "losses before and after would not compare",
    "moe": "the experts and their routing are part of what was learned",
    "model": "the weights have its shapes and meaning",
    "optim.name": "the moments belong to one optimizer",
    "data.caption_dropout": "it is part of the objective",
    "data.shuffle_group": "it is part of the order of the data",
}


def test_what_shaped_the_weights_is_refused_with_its_reason_and_nothing_else() -> None:
    """Every setting alone, changed from a value that none of them has."""
    now = config_to_dict(TrainConfig())
    for key in leaves(now):
        section, _, name = key.rpartition(".")
        value = now[section][name] if section else now[name]
        then = {**now, section: {**now[section], name: "another"}} if section else {**now, name: "another"}
        reason = "" if key == "moe.sampling_choice" else FROZEN.get(key, FROZEN.get(section, ""))
        if reason:
            with pytest.raises(
                ConfigError, match=re.escape(f"{key} is {value} but it was trained with another, and ")
            ) as error:
                compare_configs(then, now, "it")
            assert reason in str(error.value) and "restore it, or use a new run_dir" in str(error.value)
        else:
            assert compare_configs(then, now, "it") == [f"{key}: another -> {value}"]
    assert set(FROZEN) <= set(leaves(now)) | set(now)


def test_changed_settings_are_named_or_refused(tmp_path: Path) -> None:
    config = sample_config(tmp_path)
    path = write_sample(tmp_path, 10)
    assert check_resumable(path, config, TOPOLOGY, INFO) == []
    changed = replace(config, train=replace(config.train, log_every=5), optim=OptimConfig(weight_decay=0.5))
    other = Topology(world_size=2, ep_size=1, zero_stage=2)
    changed = replace(changed, train=replace(changed.train, micro_batch_size=2 * config.train.micro_batch_size))
    assert check_resumable(path, changed, other, INFO) == [
        "topology: 4 processes, ep_size 2, ZeRO 3 -> 2 processes, ep_size 1, ZeRO 2",
        "train.micro_batch_size: 8 -> 16",
        "train.log_every: 1 -> 5",
        "optim.weight_decay: 0.01 -> 0.5",
    ]
    for wrong, words in (
        (replace(config, seed=1), "seed is 1 but .* was trained with 0, and it keys the order .*: restore it, or"),
        (replace(config, optim=OptimConfig(name="sgd")), "optim.name is sgd but .* was trained with adamw"),
        (replace(config, model=replace(config.model, dim=128)), "model.dim is 128 but .* was trained with 64"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_resumable(path, wrong, TOPOLOGY, INFO)
    with pytest.raises(ConfigError, match="global batch of 32, this run has 16"):
        check_resumable(path, config, other, INFO)
    with pytest.raises(ConfigError, match="is not the data set that"):
        check_resumable(path, config, TOPOLOGY, replace(INFO, fingerprint="another"))


def test_a_pool_that_is_the_micro_batch_keeps_its_size(tmp_path: Path) -> None:
    config = replace(sample_config(tmp_path), moe=MoeConfig(pool="batch"))
    path = write_sample(tmp_path, 10, config=config)
    other = Topology(world_size=2, ep_size=1, zero_stage=2)
    loop = replace(config.train, gradient_accumulation_steps=2)
    assert "train.gradient_accumulation_steps: 1 -> 2" in check_resumable(
        path, replace(config, train=loop), other, INFO
    )
    loop = replace(config.train, micro_batch_size=2 * config.train.micro_batch_size)
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size is 16 but .* with 8, and with moe\.pool=batch"):
        check_resumable(path, replace(config, train=loop), other, INFO)


def test_settings_come_and_go_between_versions() -> None:
    now = config_to_dict(TrainConfig())
    then = {key: value for key, value in now.items() if key != "ema"} | {"old": {"knob": 3}}
    assert compare_configs(then, now, "it") == ["old.knob: 3 -> no longer a setting"]


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    path = write_sample(tmp_path, 10)
    text = (path / "state.json").read_text()
    shutil.copy(path / "state.json", tmp_path)
    (path / "state.json").write_text(text.replace('"format": 3', '"format": 2'))
    with pytest.raises(ConfigError, match="has checkpoint format 2, this version reads 3"):
        read_state(path)
