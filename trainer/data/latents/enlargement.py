"""Pictures smaller than their crop are enlarged, which adds nothing to see: by how much, and whether too much."""

import statistics
from collections.abc import Iterable

from trainer.config import DataConfig, require
from trainer.data.images.decode import cover_scale, nearest_bucket
from trainer.data.images.tar_scan import IndexRow


def scale_of(data: DataConfig, row: IndexRow) -> float:
    """How many times as large as it is a picture is made, so that it covers its crop."""
    sizes = data.picture_sizes()
    return cover_scale(row.height, row.width, *sizes[nearest_bucket(sizes, row.height, row.width)])


def check_enlargement(data: DataConfig, rows: Iterable[IndexRow]) -> None:
    """ConfigError if the middle one of some pictures would be enlarged more than `data.enlarge_up_to` allows."""
    middle = statistics.median(scale_of(data, row) for row in rows)
    setting = f"data.buckets={data.buckets}" if data.buckets else f"data.image_size={data.image_size}"
    require(
        middle <= data.enlarge_up_to,
        f"{setting} would enlarge the pictures of data.images={data.images} {middle:.2g} times (the middle one): "
        f"use a smaller size, or allow it by data.enlarge_up_to, now {data.enlarge_up_to:g}",
    )
