"""The op that models call: what torch.compile, torch.export and autograd see, and what happens without its parts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import activations, random_layer
from quantlab_kernels import force, native, quantized_linear, reference
from quantlab_kernels.compiled import GraphPass, compile_options

CSRC = Path(native.__file__).parents[1] / "csrc"


class Model(torch.nn.Module):
    """Two quantized products with something in between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = random_layer(rows=256, seed=1), random_layer(rows=8, seed=2, bias=True, rank=3)

    def forward(self, x):
        return quantized_linear(quantized_linear(x, *self.first.arguments).relu(), *self.second.arguments)


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("rank", [0, 3])
def test_keeps_the_rules_of_an_op(rows, rank):
    layer = random_layer(rank=rank, bias=bool(rank), zeros=torch.int8 if rank else None)
    codes, scales, zeros, table, bits, bias, factors = layer.arguments
    arguments = (activations(rows, 256), codes, scales, zeros, table, bits, 0, bias, *(factors or (None, None)))
    for op in (torch.ops.quantlab.linear.default, torch.ops.quantlab.linear_any.default):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_is_one_op_in_an_exported_program():
    program = torch.export.export(Model(), (activations(3, 256),), strict=False)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.quantlab.linear.default) == 2
    x = activations(3, 256, seed=5)
    assert torch.equal(program.module()(x), Model()(x))


def test_compiles_without_a_break():
    model, x = Model(), activations(3, 256)
    with torch.inference_mode():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
        assert torch.equal(compiled(x[:1]), model(x[:1]))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiles_with_inductor():
    model, x = Model(), activations(3, 256)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def several(layers):
    """Their arguments as ``quantlab::linears`` takes them."""
    codes, scales, zeros, tables, bits, biases, _ = zip(*(layer.arguments for layer in layers), strict=True)
    present = [
        [tensor for tensor in tensors if tensor is not None] for tensors in (codes, scales, zeros, tables, biases)
    ]
    return (*present[:4], bits[0], present[4])


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 35),
    outputs=st.lists(st.integers(1, 70), min_size=1, max_size=10),
    groups=st.lists(st.sampled_from([1, 2, 4]), min_size=10, max_size=10),
    integers=st.booleans(),
    zeros=st.sampled_from([None, torch.int8]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    kernel=st.sampled_from([*(f"cpu-{isa}" for isa in (*native.ISAS, native.INT8)), "reference"]),
)
def test_several_products_at_once_are_each_of_them(bits, rows, outputs, groups, integers, zeros, bias, dtype, kernel):
    """Bit for bit, whether they are stored alike or not."""
    shapes = zip(outputs, groups, strict=False)
    options = {"integers": integers, "zeros": zeros, "bias": bias}
    layers = [random_layer(bits, n, 256, g, seed=i, **options) for i, (n, g) in enumerate(shapes)]
    x = activations(rows, 256, dtype).view(rows, 1, 256)
    with force(kernel):
        y = torch.ops.quantlab.linears(x, *several(layers))
        assert torch.equal(y, torch.cat([quantized_linear(x, *layer.arguments) for layer in layers], -1))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_several_keep_the_rules_of_an_op(rows, bias):
    arguments = (activations(rows, 256), *several([random_layer(rows=n, bias=bias) for n in (8, 24)]))
    for op in (torch.ops.quantlab.linears.default, torch.ops.quantlab.linears_any.default):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_several_give_the_same_bits_with_any_number_of_threads(rows):
    arguments = several([random_layer(rows=n, columns=512, groups=8) for n in (300, 7, 130)])
    x, before, results = activations(rows, 512), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(torch.ops.quantlab.linears(x, *arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], y) for y in results[1:])


class Shared(torch.nn.Module):
    """Products of one input: three that are stored alike, one of other groups, one with a low-rank term."""

    def __init__(self):
        super().__init__()
        alike = [random_layer(rows=n, seed=n, bias=True) for n in (8, 24, 16)]
        self.layers = [*alike, random_layer(rows=8, groups=2, bias=True), random_layer(rows=8, rank=2, bias=True)]

    def forward(self, x):
        x = x * x.sum(-1, keepdim=True).cos()
        return [quantized_linear(x, *layer.arguments).relu() for layer in self.layers]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("cpp_wrapper", [False, True])
def test_products_of_one_input_are_one_call_of_a_compiled_graph(cpp_wrapper):
    graphs = []

    class Watched(GraphPass):
        def __call__(self, graph):
            super().__call__(graph)
            graphs.append([node.target for node in graph.nodes])

    model, x = Shared(), activations(3, 256, torch.float32)
    options = {**compile_options(cpp_wrapper), "post_grad_custom_pre_pass": Watched(), "fx_graph_cache": False}
    options |= {"cpp_wrapper": cpp_wrapper, "cpp_wrapper_build_separate": cpp_wrapper}
    with torch.inference_mode():
        found, expected = torch.compile(model, fullgraph=True, options=options)(x), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    (targets,) = graphs
    assert targets.count(torch.ops.quantlab.linears.default) == 2
    assert targets.count(torch.ops.quantlab.linear.default) == 1
    assert targets.count(torch.ops.aten.as_strided.default) == 1


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


_PRODUCT = """
import sys
sys.path.insert(0, {folder!r})
import torch
from products import activations, random_layer
from quantlab_kernels import choose, native, quantized_linear
{before}
for rows in (1, 40):
    layer, x = random_layer(bias=True, rank=2), activations(rows, 256)
    layer.assert_right(quantized_linear(x, *layer.arguments), x, rounds_weights=True)
print(native.register(), choose(x, *layer.arguments[:5]))
"""


def product(before: str = "", **environment: str) -> str:
    return python(_PRODUCT.format(folder=str(Path(__file__).parent), before=before), **environment)


@pytest.mark.skipif(native.library() is None, reason="the CPU kernels were not compiled here")
class TestWithoutParts:
    def test_without_a_compiler_the_op_is_called_through_python(self):
        assert product(QUANTLAB_NO_BUILD="1") == f"False cpu-{native.best_isa()} by panels"

    def test_without_compiled_kernels_torch_does_it(self):
        hidden = "import importlib.machinery as m; m.EXTENSION_SUFFIXES.clear()\n"
        code = hidden + _PRODUCT.format(folder=str(Path(__file__).parent), before="")
        assert python(code) == "False reference (the CPU kernels were not compiled)"

    def test_an_older_processor_can_be_asked_for(self):
        assert product(QUANTLAB_KERNEL="cpu-avx2").endswith("cpu-avx2 by panels")
        assert product(QUANTLAB_KERNEL="cpu-scalar").endswith("cpu-scalar by panels")

    @pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
    def test_the_op_is_built_once(self, tmp_path):
        cache = str(tmp_path)
        assert product(XDG_CACHE_HOME=cache).startswith("True")
        (built,) = tmp_path.rglob("*.so")
        before = built.stat().st_mtime_ns
        assert product(XDG_CACHE_HOME=cache).startswith("True")
        assert built.stat().st_mtime_ns == before
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == [built]

    @pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
    def test_a_home_that_cannot_be_written_to(self, tmp_path):
        (tmp_path / "file").write_text("")
        assert product(XDG_CACHE_HOME=str(tmp_path / "file")).startswith("True")


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("columns", [256, 77])
def test_activations_have_a_gradient(rank, columns):
    layer = random_layer(3, columns=columns, groups=1, rank=rank, zeros=torch.int8)
    x = activations(2, columns, torch.float32).requires_grad_()
    y = quantized_linear(x, *layer.arguments)
    assert torch.equal(y.detach(), quantized_linear(x.detach(), *layer.arguments))
    y.sum().backward()
    expected, _ = layer.product(torch.eye(columns))
    torch.testing.assert_close(x.grad, expected.sum(1).float().expand(2, -1))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_memory_is_used_as_it_should(tmp_path):
    """All widths, groups and sizes around a block, with AddressSanitizer."""
    sources = [str(path) for path in CSRC.glob("*.cpp") if path.name != "torch_op.cpp"]
    binary = tmp_path / "sanitized"
    flags = ["-O0", "-std=c++17", "-fsanitize=address", "-Wno-psabi"]  # optimized it takes minutes to build
    driver = str(Path(__file__).with_name("sanitized.cpp"))
    build = ["g++", *flags, f"-I{CSRC}", driver, *sources, "-o", str(binary)]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    if built.returncode and "asan" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr[-2000:]
    done = subprocess.run([str(binary)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "products" in done.stdout


def test_reference_is_forced_in_the_compiled_op_too():
    layer, x = random_layer(integers=False), activations(4, 256)
    with force("reference"):
        forced = quantized_linear(x, *layer.arguments)
    assert torch.equal(forced, reference.quantized_linear(x, *layer.arguments))
