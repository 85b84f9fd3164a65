"""Everything combines: every format, each in a block of its own, under every choice on the other axes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import quantlab
from quantlab.compensation import compensation_names
from quantlab.nn import QuantLinear
from quantlab.transforms import transform_names

FORMATS = [
    *("int2", "int3", "int4", "int5", "int6", "int7", "int8", "int4-narrow", "e2m1", "e3m1", "e2m2", "e3m2", "e2m3"),
    *("e4m3", "e5m2", "nf3", "nf4", "fp4", "power3", "power4:0.6", "power4:network", "codebook2", "codebook4"),
]
TRANSFORMS = {"none": {}, "awq": {"awq": {"steps": 3}}, "hadamard": {"hadamard": {}}}
ROUNDING = ["rtn", "gptq"]
REPAIRS = ["none", "lorc", "qera-exact"]
GRANULARITIES = ["tensor", "channel", 32, 64]
SCALES = ["bfloat16", "float32", "e8m0", "e4m3", "int8", "dynamic8"]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A llama with a block for each format."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=len(FORMATS),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("axes") / "model"
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    return folder


def check(original: Path, out: Path, choices: dict) -> None:
    layers = {f"model.layers.{index}.*": {"format": name} for index, name in enumerate(FORMATS)}
    tokens = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(1))
    result = quantlab.quantize(original, {**choices, "layers": layers}, out, calibration=tokens)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, quantlab.load(out)(ids).logits)

    tensors = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert len(quantized) == 7 * len(FORMATS) == len(result.reports)
    for report in result.reports:
        module, prefix = quantized[report.layer], f"{report.layer}."
        stored = [t for n, t in tensors.items() if n.startswith(prefix) and not n.endswith(".bias")]
        assert (
            sum(t.numel() * t.element_size() for t in stored) == report.bytes == module.to_qtensor().stored_bits() // 8
        )
        assert report.bits == pytest.approx(8 * report.bytes / (module.in_features * module.out_features))
        assert torch.isfinite(torch.tensor(report.error))

    # The same model with every weight written out.
    for name, module in quantized.items():
        dense = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        dense.weight = torch.nn.Parameter(module.to_qtensor().dequantize())
        if module.bias is not None:
            dense.bias = module.bias
        model.set_submodule(name, dense)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("transform", "quantizer", "compensation", "granularity"),
    list(itertools.product(TRANSFORMS, ROUNDING, REPAIRS, GRANULARITIES)),
)
def test_all_formats(transform, quantizer, compensation, granularity, original, tmp_path):
    choices = {
        "granularity": granularity,
        "quantizer": quantizer,
        "transforms": TRANSFORMS[transform],
        "compensation": compensation,
        "compensation_options": {} if compensation == "none" else {"rank": 3},
    }
    check(original, tmp_path / "out", choices)


@pytest.mark.parametrize(("scales", "symmetric"), list(itertools.product(SCALES, [True, False])))
@pytest.mark.parametrize("quantizer", ROUNDING)
def test_all_scales(scales, symmetric, quantizer, original, tmp_path):
    choices = {"granularity": 32, "quantizer": quantizer, "scale_dtype": scales, "symmetric": symmetric}
    check(original, tmp_path / "out", choices)


@pytest.mark.parametrize("compensation", sorted(set(compensation_names()) - set(REPAIRS)))
def test_all_other_repairs(compensation, original, tmp_path):
    check(original, tmp_path / "out", {"granularity": 32, "quantizer": "gptq", "compensation": compensation})


def test_nothing_is_missing_here():
    assert set(TRANSFORMS) - {"none"} == set(transform_names())
    assert set(REPAIRS) - {"none"} <= set(compensation_names())
