"""Writes into recipes the layout that the plan finds best, and in their headers what to expect and why.

    python -m trainer.plan.recipes trainer/configs/ec_dit_*.yaml

To run after a term of the plan has changed. A recipe says for how many nodes in its line "Hardware"; the global batch
stays. Lines that depend on the layout are replaced, all others kept.
"""

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

from trainer.config import ConfigError, command, require


def lines_of(report: dict[str, Any], name: str, nodes: str) -> list[tuple[str, str]]:
    """(pattern, replacement) of each part of a recipe that its best layout decides."""
    best = report["best"]
    layout, gigabytes = best["layout"], report["checkpoint_bytes"] / 1e9
    others = [stage for stage in report["stages"] if stage["layout"]["stage"] != layout["stage"]]
    why = "; ".join(f"the best with ZeRO {stage['layout']['stage']}: {stage['against_best']}" for stage in others)
    chosen = f"ep_size {layout['ep_size']}, ZeRO {layout['stage']}" if report["parameters"]["experts"] else \
        f"ZeRO {layout['stage']}"  # fmt: skip
    return [
        (r"# Hardware: .*", f"# Hardware: {nodes} node{'s' * (nodes != '1')} of 8 x H100 80 GB. Layout chosen by: "
            f"python -m trainer.plan {name} --nodes {nodes}"),
        (r"# Expected by the plan.*", "# Expected by the plan (compiled blocks; its terms are from one H100, no "
            f"cluster measured): {best['peak_bytes'] / 1e9:.0f} GB per device, {best['step_seconds']:.2f} s/step, "
            f"{best['images_per_second']:.0f} images/s, MFU {best['mfu']:.0%}, {gigabytes:.0f} GB per checkpoint."),
        (r"# Chosen: .*\n|(?=# Unmask for)", f"# Chosen: {chosen}; {why}.\n"),
        (r"\bmicro_batch_size: \d+", f"micro_batch_size: {layout['micro_batch_size']}"),
        (r"\bgradient_accumulation_steps: \d+", f"gradient_accumulation_steps: {layout['accumulation']}"),
        (r"\bactivation_checkpointing: \w+", f"activation_checkpointing: {str(layout['recompute']).lower()}"),
        (r"\bep_size: \d+", f"ep_size: {layout['ep_size']}"),
        (r"ds_configs/zero\d\.json", f"ds_configs/zero{layout['stage']}.json"),
    ]  # fmt: skip


def settled(text: str, name: str) -> str:
    """The recipe with the layout that is best under the DeepSpeed settings which that layout names."""
    from trainer.plan.__main__ import parse
    from trainer.plan.command import plan

    found = re.search(r"# Hardware: (\d+) nodes?", text)
    require(found is not None, f"{name} has no line '# Hardware: N nodes ...': say there for how many nodes it is")
    nodes = found[1] if found else ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.yaml"
        for _ in range(5):
            file.write_text(text)
            before = text
            report = plan(parse([str(file), "--nodes", nodes]))[0]
            require(report["best"] is not None, f"{name} fits on {nodes} nodes in no layout: name more in its header")
            for pattern, line in lines_of(report, name, nodes):
                text = re.sub(pattern, line, text, count=1)
            if text == before:
                return text
    raise ConfigError(f"{name} finds no layout that stays the best under its own DeepSpeed settings: choose by hand")


@command
def main(argv: list[str] | None = None) -> None:
    """Rewrite the recipes that are named."""
    parser = argparse.ArgumentParser(prog="trainer.plan.recipes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="+", type=Path, help="YAML files whose header names a number of nodes")
    from trainer.files import write_text

    for path in parser.parse_args(argv).recipes:
        require(path.is_file(), f"{path} is no file: name recipes, for instance trainer/configs/ec_dit_*.yaml")
        text = path.read_text()
        new = settled(text, path.stem)
        if new != text:
            write_text(path, new)
        print(f"{path}: {'changed' if new != text else 'as the plan says'}", flush=True)


if __name__ == "__main__":
    main()
