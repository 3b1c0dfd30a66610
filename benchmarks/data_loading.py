"""Reading and writing latents, against what they could cost; and a billion samples.

    python -m benchmarks.data_loading                                      # all tables, some minutes
    python -m benchmarks.data_loading --only reader --samples 8000 --rounds 9 --json data.json

reader   samples of 8 KiB latent and 20 tokens of width 1280 (50 KiB) from the same values, latents as fp32
         `shards`            ShardDataset in the order of an epoch, checks included; every ratio is to this
         `unchecked`         the same without CRC-32 (format 1)
         `batches`           build_loader: normalised and padded micro-batches of 32
         `webdataset`        webdataset's streaming of tars with .npy members, buffer shuffle of 1000
         `raw read`          the bytes of the shards in order, nothing made of them: the floor
encode   a tar of JPEGs, 128 pixels: `encode` is trainer.data.encode with its decoding, hashing and writing,
         `bare` the same codec (a narrow AutoencoderKL) and text encoder on what is already in memory
scale    10^9 samples in 10^5 shards: set-up, look-up and memory of the order of an epoch
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from trainer.config import require, run_cli

# Read by the OpenMP runtime that torch loads: waiting threads sleep, so CPU time counts work only.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _main(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["reader", "encode", "scale"], help="one of the tables")
    parser.add_argument("--samples", type=int, default=4000, help="samples of the reader's table")
    parser.add_argument("--pictures", type=int, default=192, help="pictures of the encoders' table")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args(argv)
    require(args.samples >= 32, f"--samples is {args.samples}: use 32 or more")
    for name in ("pictures", "rounds"):
        require(getattr(args, name) >= 1, f"--{name} is {getattr(args, name)}: use 1 or more")

    import torch  # takes seconds, and --help needs none of it

    from benchmarks.data_work import encode_work, reader_work, scale_table, table
    from benchmarks.interleaved import write_json

    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.only in (None, "scale"):
            text, found["scale"] = scale_table(folder)
            print(text + "\n")
        if args.only in (None, "reader"):
            text, found["reader"] = table(reader_work(folder, args.samples), "shards", args.samples, args.rounds)
            print(text + "\n")
        if args.only in (None, "encode"):
            text, found["encode"] = table(encode_work(folder, args.pictures), "bare", args.pictures, args.rounds)
            print(text)
    if args.json:
        write_json(args.json, found)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    run_cli(lambda: _main(argv))


if __name__ == "__main__":
    main()
