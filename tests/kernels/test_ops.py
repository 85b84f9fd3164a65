"""The op that models call: what torch.compile, torch.export and autograd see, and what happens without its parts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from products import activations, random_layer
from quantlab_kernels import force, native, quantized_linear, reference

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
    sources = [str(CSRC / name) for name in ("linear.cpp", "scalar.cpp", "avx2.cpp", "avx512.cpp", "avx512_int8.cpp")]
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
