"""What ranks tell each other after a step: named numbers in one vector, and back."""

import torch

from trainer.loop.step import StepReport

CPU = torch.device("cpu")


def report(
    loss: float, *, stop: bool = False, save: bool = False, failed: bool = False, router: tuple[float, ...] = ()
) -> StepReport:
    return StepReport(
        loss=torch.tensor(loss), stop=stop, save=save, failed=failed, lock_lost=False, router=torch.tensor(router)
    )  # fmt: skip


def test_a_report_is_read_as_it_was_written() -> None:
    mine = report(0.1, save=True, router=(0.5, 0.25, 3.0))
    vector = mine.pack(CPU)
    assert vector.dtype == torch.float32 and vector.shape == (1 + 4 + 3,)
    read = StepReport.unpack(vector)
    assert (read.stop, read.save, read.failed, read.lock_lost) == (False, True, False, False)
    assert torch.equal(read.loss, mine.loss) and torch.equal(read.router, mine.router)
    assert StepReport.unpack(report(1.0).pack(CPU)).router.shape == (0,), "a dense model has no router"


def test_a_mean_of_reports_has_the_mean_loss_and_the_flags_of_any_rank() -> None:
    ranks = [report(1.0, router=(2.0,)), report(2.0, router=(4.0,)), report(6.0, failed=True, router=(0.0,))]
    read = StepReport.unpack(torch.stack([rank.pack(CPU) for rank in ranks]).mean(0))
    assert (read.stop, read.failed, read.lock_lost) == (False, True, False)
    assert float(read.loss) == 3.0 and read.router.tolist() == [2.0]


def test_a_loss_that_is_not_finite_leaves_the_flags_readable() -> None:
    read = StepReport.unpack(torch.stack([report(torch.nan).pack(CPU), report(1.0, stop=True).pack(CPU)]).mean(0))
    assert bool(read.loss.isnan()) and read.stop and not read.failed
