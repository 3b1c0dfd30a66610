"""Image shards -> latent shards: `python -m trainer.data.encode CONFIG [key=value ...]`, under any launcher.

The tars are dealt out to the processes. A rerun goes on where a killed one stopped and gives the same bytes.
"""

import os

from trainer.config import command_parser, interruptible, load_config, require


@interruptible("tars that were encoded are kept, and the same command goes on with the others")
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = command_parser("trainer.data.encode", __doc__)
    parser.add_argument("config", help="YAML recipe, or its name in trainer/configs")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--num-threads", type=int, default=min(8, cores), help="threads that decode pictures")
    args = parser.parse_intermixed_args(argv)
    require(args.num_threads >= 1, f"--num-threads is {args.num_threads}: use 1 or more")
    data = load_config(args.config, args.overrides).data

    import torch  # takes seconds, and --help needs nothing of it

    from trainer.data.latents.encode_folder import build_encoder, encode
    from trainer.distributed import detect_world

    world = detect_world()
    encoder = build_encoder(data, args.num_threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
        torch.backends.cudnn.deterministic = True  # a rerun must give the same bytes
        torch.backends.cudnn.benchmark = False
    if not encode(encoder, rank=world.rank, world_size=world.size):
        print(f"rank {world.rank} of {world.size} is done; dataset.json is written by the one that ends last")


if __name__ == "__main__":
    main()
