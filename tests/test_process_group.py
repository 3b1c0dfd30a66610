"""The process group ends with the block that made it, unless ranks may be gone."""

from collections.abc import Iterator

import pytest
import torch

import trainer.distributed
from trainer.distributed import World, group_of_several, process_group
from trainer.errors import ConfigError

ALONE = World(rank=0, local_rank=0, size=1)


@pytest.fixture(autouse=True)
def joining(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As `init_distributed` does, but without a port or DeepSpeed."""

    def join(world: World) -> torch.device:
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
        return torch.device("cpu")

    monkeypatch.setattr(trainer.distributed, "init_distributed", join)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_it_ends_with_the_outermost_block() -> None:
    with process_group(ALONE) as device:
        assert device == torch.device("cpu")
        with process_group(ALONE):
            pass
        assert torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()


def test_one_process_alone_joins_none() -> None:
    with group_of_several(ALONE):
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("error", "stays"),
    [(ConfigError("wrong"), False), (SystemExit(1), False), (RuntimeError("lost"), True), (KeyboardInterrupt(), True)],
)
def test_after_an_error_it_ends_if_the_exit_code_counts(error: BaseException, stays: bool) -> None:
    with pytest.raises(type(error)), process_group(ALONE):
        raise error
    assert torch.distributed.is_initialized() == stays
