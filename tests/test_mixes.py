"""Several data sets drawn from by weight: shares, and the mean and deviation that normalise them, known from pixels."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.config import DataConfig, TrainConfig, TrainLoopConfig
from trainer.data.dataset import open_dataset
from trainer.data.latents import encode_folder
from trainer.data.loader import build_loader
from trainer.data.position import DataState

START = DataState(seed=0, epoch=0, consumed=0, samples_seen=0)
# Dark and bright pictures: (count, lowest, highest) pixel value. The distance of their means is most of the deviation.
SETS = [(40, 0, 60), (25, 150, 256)]
WEIGHTS = [1.0, 3.0]
EACH_TINT = np.array([1.0, 0.5, 0.8])  # of red, green, blue


def pixels() -> list[np.ndarray]:
    """uint8 [count, 8, 8, 3] of each data set."""
    rng = np.random.default_rng(0)
    return [(rng.integers(low, high, (n, 8, 8, 3)) * EACH_TINT).astype(np.uint8) for n, low, high in SETS]


def as_latents(pictures: np.ndarray) -> np.ndarray:
    """What the codec `pixel` makes of them, -1 to 1, channels second."""
    return (pictures.astype(np.float64) / 127.5 - 1).transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Both sets encoded, with their weights."""
    folder = tmp_path_factory.mktemp("mix")
    for number, pictures in enumerate(pixels()):
        images = folder / f"images{number}"
        images.mkdir()
        with tarfile.open(images / "00000.tar", "w") as tar:
            for i, picture in enumerate(pictures):
                buffer = io.BytesIO()
                Image.fromarray(picture).save(buffer, "png")
                for suffix, content in (("png", buffer.getvalue()), ("txt", f"picture {i}".encode())):
                    member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        (images / "00000_stats.json").write_text(json.dumps({"successes": len(pictures)}))
        data = DataConfig(images=str(images), latents=str(folder / f"latents{number}"), image_size=8)
        assert encode_folder.encode(encode_folder.build_encoder(data))
    return {str(folder / f"latents{number}"): weight for number, weight in enumerate(WEIGHTS)}


def config_for(mix: dict[str, float]) -> TrainConfig:
    data = DataConfig(source="shards", image_size=8, mix=mix, bucket_block=16, caption_dropout=0.0)
    return TrainConfig(data=data, train=TrainLoopConfig(micro_batch_size=16))


def concatenated() -> np.ndarray:
    """All latents in one array, each set as often as makes the shares 1 to 3: 40 * 25 and 25 * 120."""
    dark, bright = map(as_latents, pixels())
    return np.concatenate([dark] * 25 + [bright] * 120)


def test_mean_and_deviation_are_those_of_all_latents_in_one_array(mix: dict[str, float]) -> None:
    info, values = open_dataset(config_for(mix)).info, concatenated()
    assert info.mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=2e-4)  # stored in half precision
    assert info.std == pytest.approx(values.std((0, 2, 3)).tolist(), rel=1e-3)
    for pictures in pixels():
        assert (values.std((0, 2, 3)) > 2 * as_latents(pictures).std((0, 2, 3))).all(), "the means' distance counts"


def test_one_set_is_normalised_by_its_own(mix: dict[str, float]) -> None:
    for pictures, name in zip(pixels(), mix, strict=True):
        info, values = open_dataset(config_for({name: 1.0})).info, as_latents(pictures)
        assert info.mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=2e-4)
        assert info.std == pytest.approx(values.std((0, 2, 3)).tolist(), rel=1e-3)


def test_batches_hold_normalised_pictures_of_both_sets_in_their_shares(mix: dict[str, float]) -> None:
    config, values = config_for(mix), concatenated()
    mean, std = values.mean((0, 2, 3)).reshape(3, 1, 1), values.std((0, 2, 3)).reshape(3, 1, 1)
    wanted = [torch.tensor((as_latents(pictures) - mean) / std).float() for pictures in pixels()]
    dataset = open_dataset(config)
    assert len(dataset) == 64  # as many samples as there are, in blocks of 16
    loader = build_loader(dataset, config, rank=0, world_size=1, state=START)
    for _ in range(9):
        distances = [
            (next_BCHW.unsqueeze(1) - of_set.unsqueeze(0)).abs().flatten(2).amax(2).amin(1)
            for next_BCHW in [next(loader).latent_BCHW]
            for of_set in wanted
        ]
        assert float(torch.minimum(*distances).max()) < 3e-3
        assert int((distances[1] < distances[0]).sum()) == 12


def test_other_weights_are_other_data(mix: dict[str, float]) -> None:
    heavier = {name: weight + 1 for name, weight in mix.items()}
    found = [open_dataset(config_for(weights)).info.fingerprint for weights in (mix, heavier)]
    assert found[0] != found[1]
