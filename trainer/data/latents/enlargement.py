"""Pictures smaller than their crop show nothing more when enlarged: which are left out, and whether all would be."""

from collections.abc import Iterable

from trainer.config import DataConfig, require
from trainer.data.images.decode import cover_scale, nearest_bucket
from trainer.data.images.tar_scan import IndexRow


def scale_of(data: DataConfig, row: IndexRow) -> float:
    """How many times as large as it is a picture is made, so that it covers its crop."""
    sizes = data.picture_sizes()
    return cover_scale(row.height, row.width, *sizes[nearest_bucket(sizes, row.height, row.width)])


def large_enough(data: DataConfig, rows: Iterable[IndexRow]) -> list[IndexRow]:
    """Those of some pictures that are enlarged no more than `data.enlarge_up_to` allows."""
    return [row for row in rows if scale_of(data, row) <= data.enlarge_up_to]


def check_enlargement(data: DataConfig, rows: Iterable[IndexRow]) -> None:
    """ConfigError if all of some pictures would be left out."""
    least = min(scale_of(data, row) for row in rows)
    setting = f"data.buckets={data.buckets}" if data.buckets else f"data.image_size={data.image_size}"
    require(
        least <= data.enlarge_up_to,
        f"{setting} would enlarge the pictures of data.images={data.images}, the largest {least:.3g} times: use a "
        f"smaller size, or allow it by data.enlarge_up_to, now {data.enlarge_up_to:g}",
    )


def too_small(count: int) -> str:
    """What to say of pictures that were left out, if any were."""
    return f"; {count} pictures left out as smaller than their crop (data.enlarge_up_to)" if count else ""
