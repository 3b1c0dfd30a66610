"""Look at a folder of latents (or of image shards): `python -m trainer.data.inspect DIR`.

Prints counts, sizes, lengths of captions and the table of buckets, and writes a contact sheet of random samples,
decoded from their latents, with their captions. `--verify` reads every byte and compares it with its hash.
"""

import argparse
from pathlib import Path

from trainer.config import ConfigError, command, command_parser, require
from trainer.data.latents.format import DATASET_NAME
from trainer.files import write_text


def _inspect_latents(args: argparse.Namespace) -> None:
    from trainer.data.images.contact_sheet import contact_sheet  # torch takes seconds, and --help needs none of it
    from trainer.data.latents.dataset_file import check_shards, read_dataset_file
    from trainer.data.latents.describe import describe, draw_samples, verify
    from trainer.encoders.build import build_codec

    folder = read_dataset_file(args.folder)
    check_shards(folder)
    codec = build_codec(args.codec or folder.info["codec"])
    require(
        folder.codec_fingerprint in ("", codec.fingerprint()),
        f"--codec {args.codec or folder.info['codec']} is not the codec that {args.folder} was encoded with",
    )
    text = describe(folder, codec.factor, args.bucket_block)
    print(text)
    if args.num_samples:
        figures = draw_samples(folder, codec, args.num_samples, args.seed)
        out = args.out or Path(f"{args.folder.resolve().name}.html")
        write_text(out, contact_sheet(str(args.folder), text, figures))
        print(f"{out}: {len(figures)} samples")
    if args.verify:
        damaged = verify(folder)
        print("\n".join([*damaged, f"{len(folder.shards) - len(damaged)} of {len(folder.shards)} shards are whole"]))
        if damaged:
            raise SystemExit(1)


@command
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = command_parser("trainer.data.inspect", __doc__)
    parser.add_argument("folder", type=Path, help="folder of latents, or of image shards")
    parser.add_argument("--out", type=Path, help="contact sheet to write (default: NAME.html in the current folder)")
    parser.add_argument("--num-samples", type=int, default=48, help="pictures on the sheet; 0: no sheet")
    parser.add_argument("--seed", type=int, default=0, help="which samples are drawn")
    parser.add_argument("--codec", default="", help="where the codec is now, if it moved since")
    parser.add_argument("--bucket-block", type=int, default=0, help="data.bucket_block of the run, for the table")
    parser.add_argument("--verify", action="store_true", help="read every byte; exit code 1 if any is damaged")
    args = parser.parse_args(argv)
    for name in ("num_samples", "bucket_block"):
        require(getattr(args, name) >= 0, f"--{name.replace('_', '-')} is {getattr(args, name)}: use 0 or more")
    from trainer.data.images.index_file import INDEX_NAME, open_index

    if (args.folder / DATASET_NAME).is_file():
        _inspect_latents(args)
    elif (args.folder / INDEX_NAME).is_file():
        print(open_index(args.folder).summary())
    else:
        raise ConfigError(f"{args.folder} has neither {DATASET_NAME} nor {INDEX_NAME}: name a folder of latents")


if __name__ == "__main__":
    main()
