"""Train the small VAE that `data.codec=vae:FILE` names, on the pictures of `data.images`, and write FILE.

`python -m trainer.data.train_vae CONFIG data.codec=vae:FILE [key=value ...] [--steps 1500]`
"""

from pathlib import Path

from trainer.config import command, command_parser, load_config, require


@command
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = command_parser("trainer.data.train_vae", __doc__)
    parser.add_argument("config", help="YAML recipe, or its name in trainer/configs")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args(argv)
    config = load_config(args.config, args.overrides)

    from trainer.data.vae_training import train_and_save  # torch takes seconds, and --help needs none of it
    from trainer.encoders.vae import FACTOR, VAE_PREFIX

    data = config.data
    require(args.steps >= 1, f"--steps is {args.steps}: use 1 or more")
    require(data.codec.startswith(VAE_PREFIX), f"data.codec is {data.codec}: use vae:FILE with the file to write")
    require(bool(data.images), "data.images is empty: name the folder of image shards to train on")
    require(data.image_size % FACTOR == 0, f"data.image_size is {data.image_size}: use a multiple of {FACTOR}")
    train_and_save(data, config.seed, args.steps, Path(data.codec.removeprefix(VAE_PREFIX)))


if __name__ == "__main__":
    main()
