"""README.md of an export, in the form of a model hub's cards: what the run says of itself, and blanks for its owner.

Numbers come from the checkpoint and from reports of `eval.run` on the same step, with their protocol. What nobody but
the owner knows (licences, what the data is, what the model is for) is marked `FILL IN`. The card is not in the export's
manifest: it is there to be edited.
"""

import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from trainer.checkpoint.folder import step_of
from trainer.checkpoint.portable import portable_config
from trainer.checkpoint.state import SavedState
from trainer.config import TrainConfig, config_from_dict
from trainer.diffusion.model import ModelShape
from trainer.files import read_json
from trainer.settings.tokens import num_image_tokens, num_kept_tokens
from trainer.telemetry.flops import training_flops

CARD = "README.md"
BLANK = "FILL IN"
_FOLDERS = re.compile(r"(?<![\w./])/(?!/)(?:[^\s/:,\"]+/)*")  # of absolute paths; not of URLs

_HEAD = f"""---
# {BLANK}: an identifier of your hub, or `other` with license_name and license_link
license: other
license_name: {BLANK}
license_link: {BLANK}
# datasets: [{BLANK}]
pipeline_tag: text-to-image
tags: [text-to-image, diffusion-transformer, mixture-of-experts, rectified-flow, ec-dit]
---
"""

_USE = """## Use

With the package that trained it:

```python
from trainer import Pipeline

pipe = Pipeline.load("FOLDER_OF_THIS_CARD")  # encoders="DIR" where codec and text encoder lie in another folder
pipe("a cat on a blue background", num_images=4, seed=0)[0].save("cat.png")
```

Without it, the weights are plain safetensors files: `model.safetensors.index.json` says in which file each tensor is,
`config.json` has the settings.
"""

_BLANKS = f"""## About

- Licence of the weights: {BLANK}
- Training pictures and captions, where they come from and their licence: {BLANK}
- Intended use, and uses to keep away from: {BLANK}
- Known faults and biases: {BLANK}
"""


def model_card(source: Path, state: SavedState, encoders: Mapping[str, Any], *, weights: str, dtype: str) -> str:
    """The card of the checkpoint folder `source`; no path of this machine is in it."""
    config = config_from_dict(portable_config(state.config))
    rows = {**_model_rows(config, state), "weights": f"{weights}, {dtype}"} | _training_rows(config, state)
    for name, encoder in encoders.items():
        digest = f", digest `{encoder['digest']}`" if encoder["digest"] else ""
        places = "".join(f", in `{place}`" for place in encoder["places"])
        rows[name.replace("_", " ")] = f"`{encoder['setting']}`{digest}{places}"
    if state.git_commit:
        rows["code"] = f"commit {state.git_commit}"
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    title = f"# {Path(config.run_dir).name}\n\nA text-to-image diffusion transformer"
    title += " with experts (EC-DIT, arXiv 2410.02098).\n" if config.moe.every else ".\n"
    return "\n".join([_HEAD, title, table, "", _USE, _scores(source), _BLANKS])


def _model_rows(config: TrainConfig, state: SavedState) -> dict[str, str]:
    total = sum(prod(entry.shape) for entry in state.parameters)
    experts = sum(prod(entry.shape) for entry in state.parameters if ".experts." in entry.name)
    active = total - experts + experts * config.moe.capacity_factor / config.moe.num_experts
    moe = f"{config.moe.num_experts} of them, {config.moe.capacity_factor:g} a token, router {config.moe.router}"
    rows = {"parameters": f"{_count(total)}" + (f", {_count(active)} active for a token" if experts else "")}
    rows |= {"experts": moe} if config.moe.every else {}
    drawn = config.diffusion
    rows["sampling"] = f"{drawn.sampler}, {drawn.sampling_steps} steps, guidance {drawn.guidance_scale:g}"
    sizes = ", ".join(f"{height}x{width}" for height, width in config.data.picture_sizes())
    return rows | {"pictures": f"{sizes} (height x width)"}


def _training_rows(config: TrainConfig, state: SavedState) -> dict[str, str]:
    info, samples = state.data_info, state.data.samples_seen
    whole = num_image_tokens(info.height, info.width, config.model.patch_size)
    shape, total = ModelShape.of(info), 0.0
    masked_steps = min(state.step, config.diffusion.unmask_at_step or state.step)
    for step, num_steps in ((0, masked_steps), (state.step, state.step - masked_steps)):
        tokens = num_kept_tokens(whole, config.diffusion.mask_ratio_at(step))
        flops = training_flops(config.model, config.moe, shape, tokens, info.max_tokens)
        total += flops * samples * num_steps / max(1, state.step)
    names = ", ".join(f"{name} ({weight:g})" for name, weight in config.data.mix.items()) or config.data.latents
    start = f", from {config.init_from}" if config.init_from else ""
    return {
        "steps": f"{state.step:,}, global batch {state.global_batch_size:,}{start}",
        "samples seen": f"{samples:,}, epoch {state.data.epoch + 1} of `{names or 'synthetic data'}`",
        "training FLOPs": f"{total:.3g} (products, forward and backward"
        + (", all pictures taken as of the first size)" if len(info.buckets) > 1 else ")"),
    }


def _count(number: float) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"


def _scores(source: Path) -> str:
    """What reports of the run say of this step, each with its protocol."""
    step, parts = step_of(source), ["## Scores\n"]
    run = source.parent.parent
    for path in sorted([*run.glob("eval/report.json"), *run.glob("eval/*/report.json")]):
        report = read_json(path, "remove it, or run the evaluation again")
        if report.get("step") != step or "headlines" not in report:
            continue
        lines = [line for lines in report["headlines"].values() for line in lines]
        protocol = {name: result.get("card", {}) for name, result in report["results"].items()}
        text = json.dumps({"sampling": report.get("sampling", {}), **protocol}, indent=1)
        parts += [f"{report.get('summary', '')}\n", *(f"- {line}" for line in lines), ""]
        parts += ["<details><summary>protocol</summary>\n", "```json", _FOLDERS.sub("", text), "```\n", "</details>\n"]
    if len(parts) == 1:
        parts.append(f"None: there was no report of `python -m eval.run` on step {step}.\n")
    return "\n".join(parts)
