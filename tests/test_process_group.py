"""The process group ends with the block that made it, unless ranks may be gone."""

from collections.abc import Iterator

import deepspeed.comm
import pytest
import torch

from trainer.distributed import World, free_port, group_of_several, process_group

ALONE = World(rank=0, local_rank=0, size=1)


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a launcher starts one process."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} | address).items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()


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


def test_it_stays_after_an_error_which_may_mean_that_ranks_are_gone() -> None:
    with pytest.raises(RuntimeError), process_group(ALONE):
        raise RuntimeError("lost")
    assert torch.distributed.is_initialized()
