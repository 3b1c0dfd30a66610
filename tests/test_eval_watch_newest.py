"""`eval.watch RUN -- OPTIONS`: eval.run on the newest checkpoint of a run, by one process and by two."""

import json
import shutil
from pathlib import Path

import pytest
from tests_launcher import Launcher

from eval.newest import newest
from eval.watch import main
from trainer.data import encode
from trainer.data.demo import scene_shards

SCORE = ("--suite", "geneval", "--per-category", "1")


def test_options_before_and_after_the_dashes_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = ["--reference", str(tmp_path)]
    for argv, message in (
        (
            ["--prompts", "demo", "--suite", "fid", *reference, "--", *SCORE],
            "--suite stands before the --: with it, give all options of",
        ),
        (["--", "--prompts", "demo", "--suite", "best"], "--suite best is unknown"),
        (["--seconds", "0", "--"], "--seconds is 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(tmp_path), *argv])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    main([str(tmp_path), "--once", "--", "--prompts", "demo", *SCORE])  # no checkpoint: nothing to do
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_newest_checkpoint_is_scored_by_all_processes(tmp_path: Path, launcher: Launcher) -> None:
    run, images, latents = (tmp_path / name for name in ("run", "images", "latents"))
    overrides = [
        f"run_dir={run}", "data.source=shards", f"data.images={images}", f"data.latents={latents}",
        "train.max_steps=8", "train.stop_at_step=4", "train.checkpoint_every=2", "diffusion.sampling_steps=2",
        "model.patch_size=4",
    ]  # fmt: skip
    scene_shards.main(["--out", str(images), "--num-images", "32"])
    encode.main(["debug", *overrides])
    done = launcher.run("-m", "trainer.train", "debug", *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    last = newest(run)
    assert last is not None and last.name == "step_00000004"
    watch = ("-m", "eval.watch", str(run), "--seconds", "0.5", "--", *SCORE, "--out", str(tmp_path / "ignored"))
    done = launcher.run(*watch, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the last checkpoint, step 4, is scored") == 1
    report = run / "eval" / "step_00000004" / "report.json"
    assert json.loads(report.read_text())["step"] == 4
    assert sorted(path.name for path in (run / "eval").glob("step_*")) == ["step_00000004"]

    # What is scored is not scored again; an unfinished checkpoint counts as none.
    before = report.stat().st_mtime_ns
    cut_off = Path(shutil.copytree(last, last.with_name("step_00000006")))
    (cut_off / "MANIFEST.json").unlink()
    main([str(run), "--once", "--", *SCORE])
    assert report.stat().st_mtime_ns == before
