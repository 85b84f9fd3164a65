"""Corrections as a PEFT adapter: the layout, and where PEFT is installed, what it computes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from architectures import tiny_model
from safetensors.torch import load_file

import quantlab
from quantlab.cli import main
from quantlab.errors import CheckpointError
from quantlab.nn import QuantLinear

LORC = {"quantizer": "rtn", "scale_search": "mse", "compensation": "lorc"}


def without_corrections(folder):
    """The original model with each layer's weight as its codes alone have it, and the corrections' products."""
    model, plain, products = quantlab.load(folder), tiny_model("llama"), {}
    for path, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            qtensor = layer.to_qtensor()
            plain.get_submodule(path).weight.data = replace(qtensor, low_rank=None).dequantize()
            if qtensor.low_rank is not None:
                products[path] = qtensor.low_rank.product()
    return model, plain, products


@pytest.fixture(params=["bfloat16", "int8"])
def adapter(request, original, run, tmp_path):
    """A quantized Llama with corrections of several ranks in most layers, and its adapter."""
    options = {"rank": 6, "dtype": request.param}
    layers = {"*.o_proj": {"compensation": "none"}, "*.up_proj": {"compensation_options": {"rank": 3}}}
    result = run(original("llama"), {**LORC, "compensation_options": options, "layers": layers})
    return result.folder, quantlab.save_adapter(result.folder, tmp_path / "adapter", base="some/model")


def test_the_layout_is_that_of_peft(adapter):
    folder, out = adapter
    config = json.loads((out / "adapter_config.json").read_text())
    tensors = load_file(out / "adapter_model.safetensors")
    _, _, products = without_corrections(folder)
    assert set(config["target_modules"]) == set(products)
    assert not any(name.endswith("o_proj") for name in products)
    assert config["base_model_name_or_path"] == "some/model"
    assert len(tensors) == 2 * len(products)
    for name, product in products.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        assert len(a) == b.shape[1] == config["rank_pattern"][name] == (3 if "up_proj" in name else 6)
        scaling = config["alpha_pattern"][name] / config["rank_pattern"][name]
        torch.testing.assert_close(scaling * b.float() @ a.float(), product)


def test_peft_computes_what_quantlab_computes(adapter, tokens):
    peft = pytest.importorskip("peft")
    folder, out = adapter
    model, plain, _ = without_corrections(folder)
    adapted = peft.PeftModel.from_pretrained(plain, out).eval()
    with torch.no_grad():
        expected, actual = (some(input_ids=tokens[:2]).logits for some in (model, adapted))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_corrections_is_refused(original, run, tmp_path):
    result = run(original("llama"), {"quantizer": "rtn"})
    with pytest.raises(CheckpointError, match="no layer has a low-rank correction"):
        quantlab.save_adapter(result.folder, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="exists already"):
        quantlab.save_adapter(result.folder, result.folder)
    with pytest.raises(CheckpointError, match="is not quantized"):
        quantlab.save_adapter(original("llama"), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_command(adapter, tmp_path, capsys):
    folder, out = adapter
    with pytest.raises(SystemExit) as left:
        main(["export-adapter", str(folder), str(tmp_path / "again"), "--base", "some/model"])
    assert left.value.code == 0
    for file in out.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
