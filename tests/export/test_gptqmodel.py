"""GPTQ exports as GPTQModel's own code reads them, alone and below transformers.

Skipped without `gptqmodel` and `optimum`, which nothing else here needs; docs/export.md says how to put them beside.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from quantized_folders import SIZES, decoded, logits, quantized, tiny
from safetensors.torch import load_file, save_file
from tokenizers_like import byte_level
from transformers import AutoModelForCausalLM, GPTQConfig, Phi3Config, Qwen2Config

import quantlab
from quantlab.export import export
from quantlab.export.gptq import encode
from quantlab.numerics import QTensor, grid
from quantlab.verification import verify

pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")


@pytest.fixture(autouse=True)
def _as_written():
    """Without the compilation of every layer, which takes minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize(
    ("bits", "symmetric", "version", "size"), list(product((2, 3, 4, 8), (True, False), (1, 2), (32, -1)))
)
def test_a_layer_decodes_to_the_same_weight(bits, symmetric, version, size):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    rows, columns, half = 64, 96, 2 ** (bits - 1)
    groups = 1 if size < 0 else columns // size
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.randn(rows, groups, generator=generator).half()
    zeros = None
    if not symmetric:
        lowest = -half + (version == 1)
        zeros = torch.randint(lowest, half, (rows, groups), generator=generator, dtype=torch.int8)
    qtensor = QTensor(codes, scales, zeros, grid(f"int{bits}"))
    tensors, kind = encode(qtensor, version)
    assert kind == (bits, size, symmetric)

    layer = TorchLinear(bits, size, symmetric, desc_act=False, in_features=columns, out_features=rows).eval()
    layer.load_state_dict(tensors)
    if version == 1:
        convert_gptq_v1_to_v2_format_module(layer, bits=bits, pack_dtype=torch.int32)
    layer.post_init()
    weight = qtensor.dequantize()
    assert torch.equal(layer.dequantize_weight().T, weight.half())  # a product of two float16 numbers, rounded once
    x = torch.eye(columns, dtype=torch.float16)
    assert torch.equal(layer(x).T, weight.half())


WHOLE = [
    ({"format": "int4"}, None),
    ({"format": "int3", "granularity": "channel"}, 1),
    ({"format": "int4", "symmetric": False}, None),
    ({"format": "int8", "layers": {"*.0.mlp.down_proj": {"format": "none"}}}, None),
]


def same_weights(model: torch.nn.Module, folder) -> None:
    expected = decoded(folder)
    found = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    assert found.keys() == expected.keys()
    for name, module in found.items():
        assert torch.equal(module.dequantize_weight().T, expected[name].half()), name


@pytest.mark.parametrize(("changes", "version"), WHOLE)
def test_transformers_loads_a_folder(changes, version, tmp_path):
    pytest.importorskip("optimum.gptq", reason="optimum is not installed")
    folder = quantized(tmp_path, changes)
    export(folder, "gptq", tmp_path / "gptq", settings={} if version is None else {"version": version})
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gptq", dtype=torch.float16, quantization_config=GPTQConfig(bits=4, backend="gptq_torch")
    )
    same_weights(model, folder)


@pytest.mark.parametrize("config", [Qwen2Config(**SIZES), Phi3Config(**SIZES)], ids=["qwen2", "phi3"])
def test_transformers_loads_other_families(config, tmp_path):
    pytest.importorskip("optimum.gptq", reason="optimum is not installed")
    folder = quantized(tmp_path, {"format": "int4"}, tiny(config))
    assert export(folder, "gptq", tmp_path / "gptq").exact
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gptq", dtype=torch.float32, quantization_config=GPTQConfig(bits=4, backend="gptq_torch")
    )
    same_weights(model, folder)
    ours = logits(quantlab.load(folder, dtype=torch.float32))
    assert (logits(model) - ours).abs().max() < 0.01 * ours.std()


@pytest.mark.parametrize(
    ("changes", "version"),
    [*WHOLE, ({"format": "int8", "layers": {"*.down_proj": {"format": "int4", "granularity": 64}}}, None)],
)
def test_gptqmodel_loads_a_folder(changes, version, tmp_path):
    from gptqmodel import BACKEND, GPTQModel

    folder = quantized(tmp_path, changes)
    export(folder, "gptq", tmp_path / "gptq", settings={} if version is None else {"version": version})
    byte_level("gpt-2").save_pretrained(tmp_path / "gptq")
    model = GPTQModel.load(str(tmp_path / "gptq"), device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH).model
    same_weights(model, folder)


@pytest.mark.parametrize(
    "changes", [{"format": "int4"}, {"format": "int8"}, {"format": "int4", "symmetric": False}], ids=str
)
@pytest.mark.parametrize("change", ["none", "scales", "qzeros"])
def test_verification_passes_and_sees_one_wrong_number(changes, change, tmp_path, in_process):
    """In float32, against codes that are decoded to float16 as GPTQModel decodes them."""
    pytest.importorskip("optimum.gptq", reason="optimum is not installed")
    folder = quantized(tmp_path, changes)
    export(folder, "gptq", tmp_path / "gptq")
    shard = tmp_path / "gptq" / "model.safetensors"
    tensors = load_file(shard)
    name = "model.layers.1.mlp.down_proj"
    if change == "scales":
        tensors[f"{name}.scales"][1, 5] *= 1.1
    elif change == "qzeros":
        tensors[f"{name}.qzeros"][1, 0] ^= 1 << 4
    save_file(tensors, shard, metadata={"format": "pt"})
    done = verify(tmp_path / "gptq", folder)
    (check,) = (check for check in done.checks if check.name == "its predictions are those of the codes")
    assert check.passed is (change == "none"), check.detail
