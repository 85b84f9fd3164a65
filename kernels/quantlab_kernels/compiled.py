"""What torch.compile should know about ``quantlab::linear``, for steps that are many small products.

Layers that read the same input (queries, keys and values; gate and up) become one call of ``quantlab::linears``: the
input is prepared once, the threads start and wait once, and weights stay where they are. Sines and cosines are computed
once, not in each layer that reads them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

from quantlab_kernels import native

_LINEAR = torch.ops.quantlab.linear.default
_LINEARS = torch.ops.quantlab.linears.default
_FEW_ROWS = 32  # with more it is products that take the time, not the calls


def compile_options(cpp_wrapper: bool) -> dict[str, Any]:
    """What to give ``torch.compile(..., options=...)``, beside other options, for a graph that decodes on the CPU.

    Args:
        cpp_wrapper: whether these options have ``cpp_wrapper``: products are then plain calls of a C function.
    """
    options: dict[str, Any] = {"post_grad_custom_pre_pass": GraphPass()}
    if cpp_wrapper and native.register() and hasattr(config.aot_inductor, "custom_ops_to_c_shims"):
        options["aot_inductor.custom_ops_to_c_shims"] = _InC(native.LINEARS_IN_C)
    return options


class _InC(dict[Any, list[str]]):
    """The declaration of ``quantlab::linears`` in C, as torch asks for it.

    Torch pickles its options to name what it keeps in its cache, and cannot pickle an operator.
    """

    def __init__(self, declaration: str) -> None:
        super().__init__({_LINEARS: [declaration]})
        self.declaration = declaration

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.declaration,)


class GraphPass(CustomGraphPass):
    """Rewrites a graph of torch's compiler before its loops are made."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite ``graph`` in place."""
        for products in list(_products_of_one_input(graph)):
            _join(graph, products)
        for target in (torch.ops.aten.cos.default, torch.ops.aten.sin.default):
            for node in graph.find_nodes(op="call_function", target=target):
                _store(graph, node)

    def uuid(self) -> str:
        """What torch's cache of compiled graphs knows this version of the pass by."""
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _products_of_one_input(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The products that can be one call, in the order of the graph."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    found: dict[tuple[object, ...], list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=_LINEAR):
        x, _, scales, zeros, _, bits, _, bias, left, _ = node.args
        value = x.meta["val"]
        rows = value.numel() // value.shape[-1]
        if left is not None or value.device.type != "cpu" or not isinstance(rows, int) or rows > _FEW_ROWS:
            continue
        groups = scales.meta["val"].shape[1]
        key = (x, bits, groups, zeros is None, bias is None)
        products = found.setdefault(key, [])
        # All that the later ones need must be there where the first one stands.
        if all(place[other] < place[(products or [node])[0]] for other in node.all_input_nodes):
            products.append(node)
    yield from found.values()


def _join(graph: fx.Graph, products: list[fx.Node]) -> None:
    """One call in place of the first product; each product becomes its part of the result."""
    first = products[0]
    x, bits = first.args[0], first.args[5]
    operands = [[node.args[i] for node in products if node.args[i] is not None] for i in (1, 2, 3, 4, 7)]
    with graph.inserting_before(first):
        joined = _call(graph, _LINEARS, x, *operands[:4], bits, operands[4])
        begin = 0
        for node in products:
            end = begin + node.meta["val"].shape[-1]
            part = joined if len(products) == 1 else _call(graph, torch.ops.aten.slice.Tensor, joined, -1, begin, end)
            node.replace_all_uses_with(part)
            begin = end
    for node in products:
        graph.erase_node(node)


def _store(graph: fx.Graph, node: fx.Node) -> None:
    """Have the value of ``node`` in memory: what takes its strides cannot be part of a loop that computes it."""
    value = node.meta["val"]
    if not value.is_contiguous():
        return
    readers = list(node.users)
    with graph.inserting_after(node):
        stored = _call(graph, torch.ops.aten.as_strided.default, node, list(value.shape), list(value.stride()))
    for reader in readers:
        reader.replace_input_with(node, stored)


def _call(graph: fx.Graph, target: Any, *arguments: Any) -> fx.Node:
    node = graph.call_function(target, arguments)
    values = fx.map_arg(arguments, lambda argument: argument.meta["val"])
    node.meta["val"] = target(*values)
    return node
