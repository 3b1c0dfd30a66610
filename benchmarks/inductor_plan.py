"""What `torch.compile` makes of a function for a GPU, on a machine without one: its kernels and the bytes they move.

`torch._inductor` plans and writes a GPU's code before anything runs; of the GPU it only asks what it is. So it is
given the answers of an H100, and graphs that were traced on a CPU whose values claim to lie on a GPU. Fusion and code
are inductor's own, as a machine with that GPU would have them; nothing is timed, and nothing that it would choose by
trying.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._dynamo import device_interface
from torch._inductor import compile_fx, config
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._triton import has_triton

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "product_in_fp32"}
GPU = torch.device("cuda", 0)
H100 = SimpleNamespace(
    type="cuda", index=0, name="NVIDIA H100 80GB HBM3", gcnArchName="", major=9, minor=0, multi_processor_count=132,
    total_memory=80 << 30, L2_cache_size=50 << 20, warp_size=32, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, regs_per_multiprocessor=65536, shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10, shared_memory_per_multiprocessor=228 << 10, clock_rate=1980000,
    memory_clock_rate=2619000, memory_bus_width=5120,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel: "product", "fused", or the name of an operator that inductor does not write itself."""

    kind: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A function's kernels, of each of its two graphs; `kept` bytes go from the first to the second."""

    forward: list[Kernel]
    backward: list[Kernel]
    kept: int


def _interface() -> type[device_interface.DeviceInterface]:
    """What inductor asks of a device."""
    of_worker: dict[str, Callable[..., Any]] = {"get_device_properties": lambda *_: H100, "current_device": lambda: 0}
    of_device: dict[str, Callable[..., Any]] = {
        **of_worker, "device_count": lambda: 1, "get_compute_capability": lambda *_: 90, "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True, "is_triton_capable": lambda *_: True,
        "raise_if_triton_unavailable": lambda *_: None, "synchronize": lambda *_: None,
    }  # fmt: skip
    cuda = device_interface.CudaInterface
    worker = type("Worker", (cuda.Worker,), {name: staticmethod(answer) for name, answer in of_worker.items()})
    answers = {name: staticmethod(answer) for name, answer in of_device.items()}
    return type("H100Interface", (cuda,), {**answers, "Worker": worker})


@contextmanager
def as_on_h100() -> Iterator[None]:
    """Inside, who asks for the GPU hears of an H100; also where there is one."""
    from triton import runtime
    from triton.backends.compiler import GPUTarget

    answers: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_properties": lambda *_: H100, "get_device_capability": lambda *_: (9, 0),
        "is_bf16_supported": lambda *_, **__: True, "synchronize": lambda *_: None, "_lazy_init": lambda: None,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8), "set_rng_state": lambda *_: None,
        "_exchange_device": lambda _: 0, "_maybe_exchange_device": lambda _: 0,
    }  # fmt: skip
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    device_interface.get_interface_for_device("cpu")  # registers all, which would undo what comes below
    interfaces = dict.fromkeys(("cuda", "cuda:0"), _interface())
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **answers))
        stack.enter_context(mock.patch.dict(device_interface.device_interfaces, interfaces))
        stack.enter_context(mock.patch.object(runtime.driver, "_active", driver))
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(config.patch(force_disable_caches=True, compile_threads=1))
        remembered = DeviceProperties.create, has_triton
        try:
            for answer in remembered:
                answer.cache_clear()
            yield
        finally:
            for answer in remembered:
                answer.cache_clear()


def plan(function: Callable[..., Tensor], arguments: tuple[Any, ...], options: dict[str, Any] | None = None) -> Plan:
    """Compile a function of fake tensors on a CPU, forward and backward, for a GPU; `options` are inductor's."""
    found: list[list[Kernel]] = []
    kept: list[int] = []

    def compile_graph(graph: fx.GraphModule, inputs: list[Any], **how: Any) -> Any:
        kept.append(_handed_on(graph.graph))
        with as_on_h100():
            return compile_fx.compile_fx_inner(graph, _claim_gpu(graph, inputs), **how)

    def keep(lowered: GraphLowering) -> Any:
        lowered.codegen()
        found.append([kernel for node in lowered.scheduler.nodes for kernel in _kernels(node)])
        return SimpleNamespace(call=_stop, __file__=None)

    def backend(module: fx.GraphModule, inputs: list[Tensor]) -> Any:
        with config.patch(options or {}):
            return compile_fx.compile_fx(module, inputs, inner_compile=compile_graph)

    torch._dynamo.reset()
    functorch: Any = torch._functorch.config
    with functorch.patch(force_non_lazy_backward_lowering=True), mock.patch.object(
        GraphLowering, "compile_to_module", keep
    ):  # fmt: skip
        compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
        try:
            compiled(*arguments)
        except _PlannedError:
            pass
    forward, backward = found
    return Plan(forward=forward, backward=backward, kept=kept[0])


class _PlannedError(Exception):
    """Both graphs are planned, and nothing is to run."""


def _stop(_: Any) -> Any:
    raise _PlannedError


def _claim_gpu(graph: fx.GraphModule, inputs: list[Any]) -> list[Any]:
    """Make every value of a graph claim to lie on the GPU; its inputs, too, which are returned."""
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": GPU}
    mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    with mode:
        moved = [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)
            if isinstance(value, Tensor) else value
            for value in inputs
        ]  # fmt: skip
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
    return moved


def _kernels(node: BaseSchedulerNode) -> Iterator[Kernel]:
    """The kernel of one scheduled node, if it is one; within `GraphLowering`."""
    moved = node.get_read_write_buffers_sizes()
    if not isinstance(node, ExternKernelSchedulerNode):
        if moved:
            yield Kernel(kind="fused", bytes=moved)
        return
    name = getattr(node.node, "python_kernel_name", None)
    if name is not None:  # else one of several outputs
        short = name.removesuffix(".default").rpartition(".")[2]
        yield Kernel(kind="product" if short in PRODUCTS else short, bytes=moved)


def touched_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor shows, an expanded axis once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


def is_view(function: Any) -> bool:
    """Whether an operator makes no memory, by its schema."""
    schema = getattr(function, "_schema", None)
    aliases = [value.alias_info for value in schema.returns] if schema is not None else []
    return any(alias is not None and not alias.is_write for alias in aliases) or "_unsafe_view" in str(function)


def _handed_on(graph: fx.Graph) -> int:
    """Bytes that a graph returns beside its first value, of what it computes itself."""
    (returned,) = graph.output_node().args
    assert isinstance(returned, list | tuple)
    roots = set()
    for node in returned[1:]:
        while isinstance(node, fx.Node) and is_view(node.target):
            node = node.all_input_nodes[0]
        if isinstance(node, fx.Node) and node.op != "placeholder":
            roots.add(node)
    return sum(touched_bytes(node.meta["val"]) for node in roots)
