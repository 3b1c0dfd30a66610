"""The configuration of a run: a tree of frozen dataclasses, filled from a YAML recipe and `key=value` overrides.

A recipe replaces defaults, an override replaces a recipe's value. An unknown key, a wrong type or a value outside its
range is a `ConfigError` with one sentence. What each setting means stands below it, in `trainer/settings/` and
`moe/config.py`; `python -m trainer.train --settings [PREFIX]` prints it.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, TextIO

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe.config import MoeConfig as MoeConfig
from moe.ranges import between, check_ranges
from moe.routers.registry import build_router
from trainer.errors import ConfigError as ConfigError
from trainer.errors import require as require
from trainer.files import remove_leftovers, write_text
from trainer.settings.data import DataConfig as DataConfig
from trainer.settings.model import DiffusionConfig as DiffusionConfig
from trainer.settings.model import ModelConfig as ModelConfig
from trainer.settings.model import SampleConfig as SampleConfig
from trainer.settings.training import EmaConfig as EmaConfig
from trainer.settings.training import OptimConfig as OptimConfig
from trainer.settings.training import ParallelConfig as ParallelConfig
from trainer.settings.training import TrainLoopConfig as TrainLoopConfig

CONFIG_DIR = Path(__file__).parent / "configs"
STARTS_AGAIN = "nothing is kept, and the same command starts again"
_HELP = "python -m trainer.train --settings describes them"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training run: where it is, what it starts from, and a section for each concern."""

    run_dir: str = "runs/debug"
    """Folder of checkpoints, metrics, samples and logs; new, empty, or of the run to resume."""
    seed: int = field(default=0, metadata=between(0, 2**63 - 1))
    """Keys all randomness: initial weights, order of the data, noise, dropped captions; 0 or more."""
    init_from: str = ""
    """Export (`python -m trainer.checkpoint export`) whose weights a new run starts from; empty draws new weights."""
    train: TrainLoopConfig = field(default_factory=TrainLoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        require(bool(self.run_dir), "run_dir is empty: name the folder of the run")
        check_ranges(self, "", ConfigError)
        build_router(self.moe)  # refuses what the configured router cannot do
        require(
            self.moe.num_experts % self.parallel.ep_size == 0,
            f"parallel.ep_size={self.parallel.ep_size} does not divide moe.num_experts={self.moe.num_experts}: "
            "each rank of an expert group holds the same number of experts",
        )
        group, micro = self.moe.group_size if self.moe.every else 0, self.train.micro_batch_size
        require(
            group == 0 or micro % group == 0,
            f"moe.pool={self.moe.pool} and train.micro_batch_size={micro}: a pool lies within one rank's micro-batch, "
            f"so use a multiple of {group} images, or moe.pool=batch",
        )

    def global_batch_size(self, world_size: int) -> int:
        """Samples per optimizer step, over all ranks and accumulation steps."""
        return self.train.micro_batch_size * self.train.gradient_accumulation_steps * world_size


def known_keys(cls: type) -> dict[str, Any]:
    """Nested {key: None or dict} of a dataclass tree: a section is a dict, a setting None."""
    return {f.name: known_keys(f.type) if is_dataclass(f.type) else None for f in fields(cls)}  # type: ignore[arg-type]


def _check_keys(given: Any, known: dict[str, Any], path: str, origin: str) -> None:
    for key, value in given.items():
        full = f"{path}{key}"
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {path}{close[0]}?" if close else f"known keys are {', '.join(known)} ({_HELP})"
            raise ConfigError(f"{origin}: unknown key {full}; {hint}")
        require(value != "???", f"{origin}: {full} is ???: give a value")  # where OmegaConf keeps the default
        if known[key] is not None:
            require(isinstance(value, dict), f"{origin}: {full} is {value!r}: it is a section with keys of its own")
            _check_keys(value, known[key], f"{full}.", origin)


def _find_recipe(recipe: str | Path) -> Path:
    for path in (Path(recipe), CONFIG_DIR / Path(recipe).name, CONFIG_DIR / f"{recipe}.yaml"):
        with suppress(OSError):  # such as a name that is too long
            if path.is_file():
                return path
    available = ", ".join(sorted(p.stem for p in CONFIG_DIR.glob("*.yaml")))
    found = f"recipe {recipe} is a folder" if os.path.isdir(recipe) else f"no recipe {recipe}"
    raise ConfigError(f"{found}: give a YAML file or one of {available}")


def load_config(recipe: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Read a YAML recipe (a path, or a name in trainer/configs) and apply `key=value` overrides, or ConfigError."""
    path = _find_recipe(recipe)
    for item in overrides:
        require(bool(re.match(r"[A-Za-z_][\w.]*=", item)), f"override {item!r} is not of the form key=value")
        _read(f"override {item!r}", partial(OmegaConf.from_dotlist, [item]))
    from_file = _read(path.name, partial(OmegaConf.load, path))
    require(bool(from_file), f"{path.name} is empty: write at least one setting, such as run_dir ({_HELP})")
    from_cli = _read("command line", partial(OmegaConf.from_dotlist, list(overrides)))
    known = known_keys(TrainConfig)
    for origin, layer in ((path.name, from_file), ("command line", from_cli)):
        content = OmegaConf.to_container(layer)
        require(isinstance(content, dict), f"{origin}: expected a mapping of keys to values")
        _check_keys(content, known, "", origin)
    return _build(from_file, from_cli)


def _read(origin: str, read: Callable[[], Any]) -> Any:
    """What `read` returns; ConfigError in one sentence where a file cannot be read or is not YAML."""
    try:
        return read()
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise ConfigError(f"{origin}: {' '.join(str(error).split())}") from error


def _build(*layers: Any) -> TrainConfig:
    """The defaults with the values of each layer in place of those before it, checked."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), *layers))
    except OmegaConfBaseException as error:
        key, reason = getattr(error, "full_key", None), str(error).splitlines()[0]
        raise ConfigError(f"{key}: {reason}" if key else reason) from error
    except ConfigError:
        raise
    except ValueError as error:  # a check of moe.config, which knows no ConfigError
        raise ConfigError(str(error)) from error
    assert isinstance(config, TrainConfig)
    return config


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain nested dicts, lists and scalars."""
    return asdict(config)


def config_from_dict(content: dict[str, Any]) -> TrainConfig:
    """Inverse of `config_to_dict`; raises ConfigError like `load_config`."""
    _check_keys(content, known_keys(TrainConfig), "", "saved config")
    return _build(content)


def leaves(content: dict[str, Any], known: dict[str, Any] | None = None, prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts by their dotted names; a dict that `known_keys` says is one setting stays whole."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        name, below = f"{prefix}{key}", (known or {}).get(key, {})
        is_section = isinstance(value, dict) and below is not None
        found |= leaves(value, below, f"{name}.") if is_section else {name: value}
    return found


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration as YAML, as the one process that may; `load_config` of it gives an equal one."""
    remove_leftovers(path)
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config))))


def run_cli(main: Callable[[], None], errors: TextIO | None = None, stopped: str = STARTS_AGAIN) -> None:
    """Run a command-line body. A ConfigError ends it with its sentence and notes on stderr and exit code 2, Ctrl-C with
    `stopped`, which says what is kept, and 130; of several processes the first says so.
    """
    interrupted = False
    try:
        main()
    except ConfigError as error:
        print(f"error: {error}", *getattr(error, "__notes__", ()), sep="\n", file=errors or sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        interrupted = True
    if interrupted:  # not above, where the error holds what was going on, threads too, until it is let go of
        if os.environ.get("RANK", "0") == "0":
            print(f"\nstopped: {stopped}", file=errors or sys.stderr)
        raise SystemExit(130)


def command(main: Callable[[list[str] | None], None]) -> Callable[..., None]:
    """Decorator of a program's `main(argv=None)`: errors and Ctrl-C end it as `run_cli` says."""
    return interruptible(STARTS_AGAIN)(main)


def interruptible(stopped: str) -> Callable[[Callable[[list[str] | None], None]], Callable[..., None]]:
    """`command` of a program of which Ctrl-C leaves something: `stopped` says what, and how to go on."""

    def decorate(main: Callable[[list[str] | None], None]) -> Callable[..., None]:
        @wraps(main)
        def run(argv: list[str] | None = None) -> None:
            run_cli(lambda: main(argv), stopped=stopped)

        return run

    return decorate


def command_parser(program: str, doc: str | None) -> argparse.ArgumentParser:
    """Parser of `python -m PROGRAM`, whose `--help` shows the module's docstring as it stands."""
    shown = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {program}", description=doc, formatter_class=shown)
