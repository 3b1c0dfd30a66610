"""How many image tokens the model makes of a latent, and among how many of them experts choose."""

from collections.abc import Iterable

from trainer.config import TrainConfig
from trainer.errors import ConfigError, require


def num_image_tokens(height: int, width: int, patch_size: int) -> int:
    """Image tokens of a whole latent of this height and width: one for each patch."""
    return (height // patch_size) * (width // patch_size)


def num_kept_tokens(num_tokens: int, mask_ratio: float) -> int:
    """Image tokens that masked training keeps, at least 1."""
    return max(1, num_tokens - round(num_tokens * mask_ratio))


def pool_sizes(config: TrainConfig, sizes: Iterable[tuple[int, int]]) -> list[int]:
    """Tokens among which experts choose in one image of each (height, width), largest first; [] without experts.

    All of them when pictures are drawn, the kept ones in masked training.
    """
    if not config.moe.every:
        return []
    whole = {num_image_tokens(height, width, config.model.patch_size) for height, width in sizes}
    return sorted(whole | {num_kept_tokens(count, config.diffusion.mask_ratio) for count in whole}, reverse=True)


def check_latent_size(config: TrainConfig, height: int, width: int, where: str = "") -> None:
    """Raise ConfigError if a latent cannot be cut into patches or has too few tokens for the experts."""
    patch = config.model.patch_size
    require(
        height % patch == 0 and width % patch == 0,
        f"model.patch_size={patch} does not divide the latent of {height} x {width}{where}",
    )
    try:
        for count in pool_sizes(config, [(height, width)]):
            config.moe.capacity(count)
    except ValueError as error:
        raise ConfigError(str(error)) from error
