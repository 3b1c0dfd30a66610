"""Image tokens of a latent: all of them, and those that masking keeps."""

from collections.abc import Iterable


def num_image_tokens(height: int, width: int, patch_size: int) -> int:
    """Image tokens of a whole latent of this height and width: one for each patch."""
    return (height // patch_size) * (width // patch_size)


def num_kept_tokens(num_tokens: int, mask_ratio: float) -> int:
    """Image tokens that masked training keeps, at least 1."""
    return max(1, num_tokens - round(num_tokens * mask_ratio))


def token_counts(sizes: Iterable[tuple[int, int]], patch_size: int, mask_ratio: float) -> list[int]:
    """Among how many image tokens the layers work: of latents (height, width), in sampling and in training, sorted."""
    full = {num_image_tokens(height, width, patch_size) for height, width in sizes}
    return sorted(full | {num_kept_tokens(count, mask_ratio) for count in full})
