"""Codecs and text encoders: well-known ones and how to fetch them, and whether what is here can be used.

    python -m trainer.encoders list                            # settings, licences, commands of the hub's own client
    python -m trainer.encoders check models/sd3/vae            # a folder: what it is, tried on a picture or a caption
    python -m trainer.encoders check t5@120:models/t5_xxl      # or a setting of data.codec or data.text_encoder

Nothing is downloaded. `check` ends with code 2 and one sentence where an encoder cannot be used.
"""

from trainer.config import command, command_parser, require
from trainer.encoders import catalog


@command
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = command_parser("trainer.encoders", __doc__)
    parser.add_argument("action", choices=["list", "check"])
    parser.add_argument("encoder", nargs="?", help="for check: a folder, or a setting")
    given = parser.parse_args(argv)
    if given.action == "list":
        for title, known in (("data.codec", catalog.CODECS), ("data.text_encoder", catalog.TEXT_ENCODERS)):
            print("\n".join([title, *(f"  {line}" for encoder in known for line in encoder.lines())]))
        return
    require(bool(given.encoder), "check needs an encoder: name a folder, or a setting such as t5@120:models/t5_xxl")
    from trainer.encoders.check import check  # here, as is torch, so that --help is quick

    print("\n".join(check(given.encoder)))


if __name__ == "__main__":
    main()
