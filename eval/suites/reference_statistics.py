"""Reference statistics of FID: mean and covariance in the npz files that pytorch-fid, clean-fid and ADM exchange.

All three hold `mu` and `sigma`; ADM's hold spatial statistics and pictures too. Ours add how they were made: the
resize convention, the count and the hash of the weights, which the other programs ignore. A file without a named
convention has to be given one by the user; a file of another convention is refused.

    python -m eval.suites.reference_statistics PICTURES --out reference.npz --convention torch-fidelity

Shapes: N pictures, D features.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.files import check_file
from trainer.config import ConfigError, command_parser, interruptible, require
from trainer.files import check_writable, replacing

if TYPE_CHECKING:
    from eval.metrics.frechet import Moments


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Moments with their origin; `count` 0 and empty texts mean that a file did not say."""

    moments: "Moments"
    convention: str = ""
    weights_sha256: str = ""
    source: str = ""


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Write an npz that pytorch-fid and clean-fid read as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            mu=statistics.moments.mean_D.cpu().numpy(),
            sigma=statistics.moments.covariance_DD.cpu().numpy(),
            count=np.array(statistics.moments.count),
            convention=np.array(statistics.convention),
            weights_sha256=np.array(statistics.weights_sha256),
            source=np.array(statistics.source),
        )


def _read_arrays(path: Path) -> tuple[Any, Any, int, dict[str, str]]:
    """mu, sigma, the count and the texts that a file holds; ConfigError if it has no statistics."""
    from eval.pictures.image_files import open_npz

    with open_npz(path) as content:
        require(
            "mu" in content and "sigma" in content,
            f"{path} has {', '.join(content.files) or 'nothing'}, reference statistics have mu and sigma: build them "
            "with python -m eval.suites.reference_statistics",
        )
        try:
            mu, sigma = content["mu"], content["sigma"]
        except ValueError as error:  # pickled objects
            raise ConfigError(f"{path} holds no plain arrays ({error}): build it again") from error
        texts = {key: str(content[key]) for key in ("convention", "weights_sha256", "source") if key in content}
        # ADM's own files are the only ones with spatial statistics, and have the TensorFlow resize.
        if "mu_s" in content and not texts.get("convention"):
            texts["convention"] = "torch-fidelity"
        return mu, sigma, int(content.get("count", 0)), texts


def read_statistics(path: Path, convention: str = "") -> Statistics:
    """Statistics of an npz of any of the ecosystems.

    `convention` is what the caller compares with: a file that names another one is refused, and for a file that
    names none it says what the file is. ConfigError for whatever does not fit.
    """
    import torch

    from eval.metrics.frechet import Moments

    mu, sigma, count, texts = _read_arrays(path)
    mu, named = np.squeeze(mu), texts.get("convention", "")
    require(
        mu.ndim == 1 and sigma.shape == (mu.size, mu.size),
        f"{path}: mu is {mu.shape} and sigma {sigma.shape}, they must be [D] and [D, D]",
    )
    require(bool(np.isfinite(mu).all() and np.isfinite(sigma).all()), f"{path} holds values that are not finite")
    require(
        not (named and convention and named != convention),
        f"{path} was made with the resize of {named}, the pictures are read with that of {convention}: "
        f"use --convention {named}",
    )
    found = Moments(count=count, mean_D=torch.from_numpy(mu).double(), covariance_DD=torch.from_numpy(sigma).double())
    return Statistics(moments=found, **{**texts, "convention": named or convention})


def build_statistics(pictures: Path, store_folder: Path, convention: str) -> Statistics:
    """Statistics of a folder or ADM batch file of pictures; features are kept in `store_folder`."""
    from eval.metrics.frechet import moments_of
    from eval.networks.inception import InceptionEncoder
    from eval.pictures.image_files import folder_files, unpack_npz
    from eval.scoring.feature_store import FeatureStore, add_picture_features, hash_files

    files = unpack_npz(pictures, store_folder / "unpacked") if pictures.suffix == ".npz" else folder_files(pictures)
    encoder = InceptionEncoder(convention)
    store = FeatureStore(store_folder, encoder.key, encoder.dim)
    add_picture_features(store, encoder, files)
    found = moments_of(store.read(hash_files(files)))
    return Statistics(
        moments=found,
        convention=convention,
        weights_sha256=encoder.key["weights_sha256"],
        source=f"{len(files)} pictures of {pictures.name}",
    )


@interruptible("features so far are kept, and the same command goes on from there")
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = command_parser("eval.suites.reference_statistics", __doc__)
    parser.add_argument("pictures", type=Path, help="folder of pictures, or an npz with arr_0")
    parser.add_argument("--out", type=Path, required=True, help="npz to write")
    parser.add_argument(
        "--convention", default="torch-fidelity", help="torch-fidelity, clean, pytorch-fid (default %(default)s)"
    )
    parser.add_argument("--features", type=Path, help="folder of cached features (default beside --out)")
    given = parser.parse_args(argv)
    from eval.networks.resize import check_convention
    from eval.pictures.image_files import left_out

    check_convention(given.convention)
    require(given.out.suffix == ".npz", f"--out {given.out} must end in .npz")
    check_file(given.out, "--out")
    store = given.features or given.out.parent / "features"
    check_writable(store, f"--features {store}")
    write_statistics(given.out, build_statistics(given.pictures, store, given.convention))
    print(*(left_out(given.pictures) if given.pictures.is_dir() else ()), given.out, sep="\n")


if __name__ == "__main__":
    main()
