"""Where the time of an optimizer step goes: on chosen steps, with the device waited for at every border.

| section      | what is in it, without the sections inside it                             |
|--------------|---------------------------------------------------------------------------|
| `data`       | reading and noising the next step's micro-batches, the copy to the device |
| `forward`    | the model and the loss                                                    |
| `experts`    | the experts' MLPs, forward (their backward is part of `backward`) (*)     |
| `all_to_all` | exchanges of rows between ranks, forward and backward (*)                 |
| `gather`     | ZeRO-3 fetching weights, forward and backward                             |
| `backward`   | gradients, and their reduction where it does not overlap                  |
| `optimizer`  | gradient reduction that is left, clipping, the update, the average        |

(*) Not where blocks are compiled: a graph has no borders inside.

Waiting at borders takes overlap away, so a measured step is slower than others. Other steps run as if there were no
timer: nothing is hooked into the model then.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from moe.all_to_all import ExpertGroup
from moe.layer import MoeLayer


class StepTimer:
    """Seconds of each section of the last measured step; sections may nest, each second counts once.

    `entered` is told of each section that is in no other one, in every step.
    """

    def __init__(self, device: torch.device, entered: Callable[[str], None] = lambda _: None) -> None:
        self.device, self.entered = device, entered
        self.active = False
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count the time inside to `name`, and not to the section around it."""
        if not self._open:
            self.entered(name)
        if not self.active:
            yield
            return
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def measuring(self, engine: Any, wanted: bool) -> Iterator[None]:
        """Measure what runs inside, if `wanted`: hooks are set for that long only."""
        if not wanted:
            yield
            return
        with ExitStack() as hooks:
            for owner, name, value in [*self._watch_layers(engine.module), *self._watch_gathers(engine)]:
                hooks.enter_context(_replaced(owner, name, value))
            self.seconds, self.active = {}, True
            hooks.callback(setattr, self, "active", False)
            yield

    def take(self) -> dict[str, float]:
        """`time/SECTION` in seconds, once; empty if nothing was measured since."""
        taken, self.seconds = self.seconds, {}
        return {f"time/{name}": value for name, value in taken.items()}

    def _watch_layers(self, model: torch.nn.Module) -> Iterator[tuple[Any, str, object]]:
        if getattr(model, "is_compiled", False):
            return
        for layer in [module for module in model.modules() if isinstance(module, MoeLayer)]:
            yield layer.experts, "forward", self._timed("experts", layer.experts.forward)
            if isinstance(layer.group, ExpertGroup):
                begin, end = (self._timed("all_to_all", part) for part in (layer.group.begin, layer.group.end))
                yield layer, "group", replace(layer.group, begin=begin, end=end)

    def _watch_gathers(self, engine: Any) -> Iterator[tuple[Any, str, object]]:
        """DeepSpeed 0.19.8's coordinator of ZeRO-3; a version without it gives no `gather` section."""
        offload = getattr(engine.optimizer, "parameter_offload", None)
        coordinator = offload.get_param_coordinator() if offload is not None else None
        fetch = getattr(coordinator, "fetch_sub_module", None)
        if fetch is not None:
            yield coordinator, "fetch_sub_module", self._timed("gather", fetch)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.section(name):
                return function(*args, **kwargs)

        return run


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Inside, an attribute of an object is `value`; afterwards the old one is back, the class's included."""
    own = dict(vars(owner))
    setattr(owner, name, value)
    try:
        yield
    finally:
        if name in own:
            setattr(owner, name, own[name])
        else:
            delattr(owner, name)
