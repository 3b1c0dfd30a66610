"""What a compiler that fuses makes of a graph: kernels and the bytes that each moves, from the graph alone.

`torch._inductor` fuses otherwise for a CPU than for a GPU, and plans for a GPU only where there is one, so a rule
stands in for it. Values are traced by `aot_function` with inductor's decompositions and partition, then:

- A view costs nothing: who reads it reads what it shows, an expanded axis once.
- Matrix products, attention, sorts, top-k and sums of ragged rows are kernels of their own.
- Everything pointwise, and sums or maxima along the last axis, fuses with what it feeds and with what reads the same
  values, but never around a kernel of another kind: the level of a value is how many such kernels lie before it, or as
  late as its first reader allows.
- Looking rows up (`index`, `gather`) fuses with what reads the result; what it looks up in must be in memory.
- A sum over tokens or images is a kernel that computes pointwise inputs again where they are not in memory; sums of one
  level that share an input are one kernel.

Each kernel reads what it needs from memory once, and writes what a later one, or the caller, needs.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
LOOK_UPS = {"index", "index_select", "gather", "embedding"}
SORTS = {"sort", "topk", "searchsorted", "_embedding_bag", "embedding_bag", "_embedding_bag_forward_only", "bincount"}
REDUCTIONS = {"sum", "mean", "amax", "amin", "var", "var_mean", "prod", "max", "min", "any", "all", "argmax", "argmin"}
CONSTANTS = {
    "full",
    "arange",
    "iota",
    "scalar_tensor",
    "zeros",
    "ones",
    "empty",
    "full_like",
    "new_zeros",
    "zeros_like",
}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel: what it is ("product", "attention", "fused", or the name of an operator) and the bytes it moves."""

    kind: str
    bytes: int


def touched_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor shows, an expanded axis once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


def kernels_of(graph: fx.Graph, attention: Sequence[str]) -> list[Kernel]:
    """The kernels of a traced graph; `attention` are names of operators that stand for it."""
    return _Fusion(graph, set(attention)).kernels()


def kept_bytes(graph: fx.Graph) -> int:
    """Bytes that a forward graph hands to its backward graph, of what it computes itself."""
    fusion = _Fusion(graph, set())
    (handed,) = graph.output_node().args
    assert isinstance(handed, list | tuple)
    roots = {fusion._root(node) for node in handed[1:] if isinstance(node, fx.Node)}
    return sum(_value_bytes(root) for root in roots if root.op != "placeholder")


class _Fusion:
    """A graph's values sorted into kernels; see the module docstring."""

    def __init__(self, graph: fx.Graph, attention: set[str]) -> None:
        self.nodes, self.attention = list(graph.nodes), attention
        self.kind = {node: self._kind(node) for node in self.nodes}
        self.level = self._levels()
        self.group = {node: node for node in self.nodes}  # union-find over fused values
        self._fuse()

    def _kind(self, node: fx.Node) -> str:
        if node.op in ("placeholder", "get_attr"):
            return "memory"
        if node.op == "output" or node.target is operator.getitem:
            return "output" if node.op == "output" else "view"
        name = _name(node)
        if name in self.attention:
            return "attention"
        if name in PRODUCTS:
            return "product"
        if name in CONSTANTS:
            return "constant"
        if name in SORTS:
            return name
        if name in REDUCTIONS:
            return "row sum" if _is_along_rows(node) else "sum"
        if name in LOOK_UPS:
            return "look-up"
        return "view" if is_view(node.target) else "pointwise"

    def _fuses(self, node: fx.Node) -> bool:
        return self.kind[node] in ("pointwise", "row sum", "look-up")

    def _root(self, node: fx.Node) -> fx.Node:
        """The value that a view shows."""
        return self._root(node.all_input_nodes[0]) if self.kind[node] == "view" else node

    def _step(self, source: fx.Node, node: fx.Node) -> int:
        """1 if a value must be in memory before `node` can read it, else 0."""
        root = self._root(source)
        if self.kind[node] == "view" or self.kind[root] in ("memory", "constant"):
            return 0
        looks_up = self.kind[node] == "look-up" and source is node.all_input_nodes[0]
        return int(looks_up or not self._fuses(root))

    def _levels(self) -> dict[fx.Node, int]:
        """Of each value: as early as can be, then what fuses as late as its first reader allows."""
        level: dict[fx.Node, int] = {}
        for node in self.nodes:
            level[node] = max((level[source] + self._step(source, node) for source in node.all_input_nodes), default=0)
        latest: dict[fx.Node, int] = {}
        for node in reversed(self.nodes):
            if self._fuses(node) and node in latest:
                level[node] = latest[node]
            if self.kind[node] == "output" or (self.kind[node] == "view" and node not in latest):
                continue  # what only the caller reads stays early
            wanted = latest[node] if self.kind[node] == "view" else level[node]
            for source in node.all_input_nodes:
                latest[source] = min(latest.get(source, wanted), wanted - self._step(source, node))
        return level

    def _find(self, node: fx.Node) -> fx.Node:
        joined: fx.Node = self.group[node]
        return node if joined is node else self._find(joined)

    def _fuse(self) -> None:
        """Join values of one level that feed each other, or read the same value of their size from memory."""
        readers: dict[tuple[fx.Node, int, int, str], fx.Node] = {}
        for node in self.nodes:
            if not (self._fuses(node) or self.kind[node] == "sum"):
                continue
            for source in node.all_input_nodes:
                root = self._root(source)
                if self._fuses(node) and self._fuses(root) and self.level[root] == self.level[node]:
                    self.group[self._find(node)] = self._find(root)
                elif self.kind[root] != "constant" and _elements(source) > 1:
                    kind = "sum" if self.kind[node] == "sum" else "pointwise"
                    key = (root, self.level[node], _elements(source if kind == "sum" else node), kind)
                    first = readers.setdefault(key, node)
                    self.group[self._find(node)] = self._find(first)

    def kernels(self) -> list[Kernel]:
        """All kernels, in no order."""
        written = self._written()
        members: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.nodes:
            if self._fuses(node) or self.kind[node] == "sum":
                members[self._find(node)].append(node)
        found = [self._own_kernel(node) for node in self.nodes if self._is_own(node)]
        for nodes in members.values():
            results = [node for node in nodes if node in written]
            if results:  # else those who read it compute it
                moved = self._read(nodes, written) + sum(_value_bytes(node) for node in results)
                found.append(Kernel(kind="fused", bytes=moved))
        return found

    def _is_own(self, node: fx.Node) -> bool:
        return self.kind[node] in ("product", "attention") or self.kind[node] in SORTS

    def _own_kernel(self, node: fx.Node) -> Kernel:
        moved = _value_bytes(node) + sum(_value_bytes(source) for source in node.all_input_nodes)
        return Kernel(kind=self.kind[node], bytes=moved)

    def _written(self) -> set[fx.Node]:
        """Fused values that someone outside of their kernel reads; sums always are."""
        written = set()
        for node in self.nodes:
            if self.kind[node] == "view":
                continue
            for source in node.all_input_nodes:
                root = self._root(source)
                if self.kind[root] == "sum":
                    written.add(root)
                elif self._fuses(root) and self.kind[node] != "sum" and self._find(root) is not self._find(node):
                    written.add(root)
        return written

    def _read(self, nodes: Iterable[fx.Node], written: set[fx.Node]) -> int:
        """Bytes that a fused kernel reads: of each value in memory what its views show together, at most all of it."""
        inside = set(nodes)
        shown: dict[fx.Node, dict[fx.Node, int]] = defaultdict(dict)
        queue = list(inside)
        seen = set(queue)
        while queue:
            node = queue.pop()
            for source in node.all_input_nodes:
                root = self._root(source)
                if root in inside or self.kind[root] == "constant":
                    continue
                inlined = self._fuses(root) and root not in written
                if inlined and self.kind[root] == "pointwise":
                    if root not in seen:
                        seen.add(root)
                        queue.append(root)
                    continue
                shown[root][source] = _value_bytes(source if self.kind[node] != "look-up" else _smaller(source, node))
        return sum(min(sum(views.values()), _value_bytes(root)) for root, views in shown.items())


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return str(
        target.overloadpacket.__name__ if hasattr(target, "overloadpacket") else getattr(target, "__name__", target)
    )


def is_view(function: Any) -> bool:
    """Whether an operator makes no memory, by its schema."""
    schema = getattr(function, "_schema", None)
    aliases = [value.alias_info for value in schema.returns] if schema is not None else []
    return any(alias is not None and not alias.is_write for alias in aliases) or "_unsafe_view" in str(function)


def _is_along_rows(node: fx.Node) -> bool:
    """Whether a reduction is along the last axis alone."""
    source = node.all_input_nodes[0].meta["val"]
    axes = node.args[1] if len(node.args) > 1 else None
    wanted: list[Any] = [axes] if isinstance(axes, int) else list(axes) if isinstance(axes, list | tuple) else []
    return [axis % source.dim() for axis in wanted] == [source.dim() - 1]


def _values(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [part for part in (value if isinstance(value, list | tuple) else [value]) if isinstance(part, Tensor)]


def _value_bytes(node: fx.Node) -> int:
    return sum(touched_bytes(value) for value in _values(node))


def _smaller(first: fx.Node, second: fx.Node) -> fx.Node:
    return min(first, second, key=_value_bytes)


def _elements(node: fx.Node) -> int:
    return sum(value.numel() for value in _values(node))


def traced(function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> list[fx.GraphModule]:
    """Forward and backward graph of a function of fake tensors, as torch.compile hands them to its code generator."""
    from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = aot_function(
        function, fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )  # fmt: skip
    out = compiled(*arguments)
    out.backward(torch.empty_like(out))
    return graphs
