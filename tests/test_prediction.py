"""The roofline against figures worked out by hand, and what it says of a model against the model itself."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import quantlab
from quantlab.devices import device_called, device_names, split_devices
from quantlab.engine.footprint import planned_storage, stored_bytes
from quantlab.engine.solve import plan_layer
from quantlab.errors import QuantlabError
from quantlab.model_shape import Attention, Shape, model_shapes
from quantlab.numerics import LowRank, QTensor, apply_scales, choose_scales
from quantlab.prediction import predict
from quantlab.recipe import Scheme, load_recipe
from quantlab.storage import Storage

# The example of arXiv:2405.08944: 34 billion weights in BF16, 60 layers, 8 key heads of 128, width 7168, on an A100.
GIB = 1 << 30
WEIGHTS = 34e9
YI = Shape("original", 2 * WEIGHTS, 2 * WEIGHTS, WEIGHTS, (Attention(7168, 2 * 8 * 128),) * 60)
A100 = "a100(bandwidth=2000,link=20)"


def test_the_papers_example():
    device = device_called(A100)
    assert YI.kv_bytes(1) == 245_760
    assert YI.kv_bytes(4000) / GIB == pytest.approx(0.92, abs=0.01)
    assert YI.kv_bytes(100_000) / GIB == pytest.approx(22.9, abs=0.05)
    short, long = predict(YI, device, 4000), predict(YI, device, 50_000)
    assert long.kv_bytes / GIB == pytest.approx(11.4, abs=0.05)
    assert (short.concurrency, long.concurrency) == (18, 1)
    assert predict(YI, replace(device, memory=80e9), 4000).concurrency == 12  # about 13, says the paper
    assert short.prefill_seconds == pytest.approx(0.9, abs=0.05)
    assert long.prefill_seconds == pytest.approx(17.8, abs=0.05)
    assert predict(YI, device, 1).step_seconds == pytest.approx(0.034, abs=1e-4)
    assert long.step_seconds - predict(YI, device, 1).step_seconds == pytest.approx(50_000 * 245_760 / 2e12, rel=1e-3)
    assert long.switch_seconds == pytest.approx(1.2, abs=0.1)
    assert long.boundary_batch == pytest.approx(156, abs=0.5)


def test_levers():
    """Fewer bits of the cache change its terms alone; four bits a weight make room for five contexts."""
    device = device_called(A100)
    full, half = predict(YI, device, 50_000), predict(replace(YI, kv_bits=8), device, 50_000)
    assert half.kv_bytes == full.kv_bytes / 2
    assert half.switch_seconds == full.switch_seconds / 2
    assert half.prefill_seconds == full.prefill_seconds
    assert full.step_seconds - half.step_seconds == pytest.approx(half.kv_bytes / 2e12)
    quarter = replace(YI, bytes=WEIGHTS / 2, dense_bytes=WEIGHTS / 2)
    four = predict(quarter, device, 50_000)
    assert four.concurrency == 5
    assert four.batch_tokens_per_second == pytest.approx(5 / ((WEIGHTS / 2 + 5 * four.kv_bytes) / 2e12))
    assert four.boundary_batch == pytest.approx(full.boundary_batch / 4)
    assert full.fits
    assert not predict(YI, device, 100_000).fits
    assert predict(quarter, device, 100_000).fits


def test_a_step_of_many_tokens_is_bound_by_operations():
    device = device_called("mine(tflops=1,bandwidth=1000,memory=1000)")
    shape = Shape("s", 1e9, 1e9, 5e8, (Attention(1, 2),), kv_bits=8)
    found = predict(shape, replace(device, memory=1e12), 100)
    assert found.step_seconds == pytest.approx((1e9 + 200) / 1e12)  # its operations take 1 ms, too
    assert found.concurrency == math.floor(999e9 / 200)
    assert found.batch_tokens_per_second == pytest.approx(1e12 / 1e9, rel=1e-6)


def test_windows():
    """Pairs of a query and a key, counted one by one (the diagonal by half)."""
    attention = Attention(8, 16, window=5)
    for tokens in (1, 4, 5, 6, 20):
        counted = sum(min(token, 5) for token in range(1, tokens + 1))
        assert attention.pairs(tokens) == pytest.approx(counted, abs=2.6)
        assert attention.seen(tokens) == min(tokens, 5)
    assert Shape("s", 1, 1, 1, (attention, Attention(8, 16))).kv_bytes(20) == (5 + 20) * 16 * 2


def test_experts():
    shape = Shape("s", 0, 100, 1000, (), routed_bytes=800, routed_weights=8000, routed_share=2 / 8)
    assert shape.active_weights == 3000
    assert shape.read_bytes(1) == 300
    assert shape.read_bytes(10**6) == 900
    assert 300 < shape.read_bytes(2) < 500


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}


def save(config, folder, kind=None):
    (kind or LlamaForCausalLM)._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_as_it_is(tmp_path, tied):
    """Against the model in memory: its parameters, its cache, and operations counted by hooks."""
    config = LlamaConfig(vocab_size=80, num_key_value_heads=2, tie_word_embeddings=tied, **SIZES)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    config.save_pretrained(tmp_path)  # the config is all that is needed
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    (shape,) = model_shapes(tmp_path, None)
    shape = replace(shape, kv_bits=16)
    every = sum(parameter.numel() for parameter in model.parameters())
    itemsize = 2 if shape.bytes == 2 * every else 4  # config.json need not name a dtype
    assert shape.bytes == itemsize * every
    unread = 0 if tied else model.get_input_embeddings().weight.numel()
    assert shape.dense_bytes == itemsize * (every - unread)
    assert shape.dense_weights == sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.arange(11).unsqueeze(0), past_key_values=cache)
    assert shape.kv_bytes(11) == sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))


def test_experts_of_a_model(tmp_path):
    config = MixtralConfig(vocab_size=80, num_local_experts=4, num_experts_per_tok=1, num_key_value_heads=2, **SIZES)
    (shape,) = model_shapes(save(config, tmp_path, MixtralForCausalLM), None)
    assert shape.routed_weights == 3 * 4 * 3 * 64 * 96
    assert shape.routed_bytes == 2 * shape.routed_weights
    assert shape.routed_share == 1 / 4


def test_sliding_windows_of_a_model(tmp_path):
    config = MistralConfig(vocab_size=80, num_key_value_heads=4, sliding_window=7, **SIZES)
    (shape,) = model_shapes(save(config, tmp_path, MistralForCausalLM), None)
    assert {layer.window for layer in shape.attention} == {7}
    assert shape.kv_bytes(100) == shape.kv_bytes(50)


def test_a_recipe_against_the_files_that_it_makes(tmp_path):
    """The prediction is made without weights; what quantize then writes has that size, its headers aside."""
    config = LlamaConfig(vocab_size=80, num_key_value_heads=2, tie_word_embeddings=False, **SIZES)
    source = save(config, tmp_path / "m")
    overrides = ["granularity=32", "scale_search=absmax", "layers={'*.down_proj': {format: nf4, symmetric: false}}"]
    _, shape = model_shapes(source, load_recipe("w4-rtn", overrides))
    result = quantlab.quantize(source, "w4-rtn", tmp_path / "q", overrides=overrides)
    inspection = quantlab.inspect(tmp_path / "q")
    assert shape.bytes == inspection.bytes_quantized + inspection.bytes_kept
    assert shape.bytes < result.bytes < shape.bytes + 50_000
    assert shape.dense_bytes == shape.bytes - 80 * 64 * 2  # an embedding is looked up


@settings(deadline=None, max_examples=60)
@given(
    form=st.sampled_from(["int2", "int3", "int4", "int8", "e3m2", "nf4", "power4:0.5"]),
    granularity=st.sampled_from([16, 48, "channel", "tensor"]),
    scales=st.sampled_from(["float32", "float16", "bfloat16", "e8m0", "e4m3", "int8", "dynamic8"]),
    symmetric=st.booleans(),
    rank=st.sampled_from([0, 3, 200]),
    factors=st.sampled_from(["bfloat16", "int8"]),
    rows=st.integers(1, 40),
)
def test_planned_storage_is_that_of_a_quantized_layer(form, granularity, scales, symmetric, rank, factors, rows):
    repair = {"compensation": "lorc", "compensation_options": {"rank": rank, "dtype": factors}} if rank else {}
    scheme = Scheme(
        format=form, granularity=granularity, scale_dtype=scales, symmetric=symmetric, scale_search="absmax", **repair
    )
    weight = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows))
    grid = scheme.grid_for(weight, None)
    chosen = choose_scales(weight, grid, granularity, symmetric=symmetric, search=False, stored=scales)
    low_rank = None
    if rank:
        kept, dtype = min(rank, rows, 96), getattr(torch, factors)
        inner = torch.ones(kept) if dtype == torch.int8 else None
        low_rank = LowRank(torch.ones(rows, kept).to(dtype), torch.ones(kept, 96).to(dtype), inner)
    made = QTensor(
        apply_scales(weight, grid, chosen), chosen.scales, chosen.zeros, grid, low_rank=low_rank, outer=chosen.outer
    )
    planned = planned_storage(plan_layer("layer", "", (rows, 96), scheme))
    assert planned == Storage.of(made)
    assert 8 * stored_bytes(planned) == made.stored_bits()


def test_roofline_of_a_folder(tmp_path):
    config = LlamaConfig(vocab_size=80, num_key_value_heads=2, tie_word_embeddings=False, **SIZES)
    found = quantlab.roofline(
        save(config, tmp_path / "m"), "w4-rtn", ["h100", "a100"], tokens=100, overrides=["granularity=32"]
    )
    assert [(p.device, p.model) for p in found.predictions] == [
        *(("h100", "original"), ("h100", "w4-rtn"), ("a100", "original"), ("a100", "w4-rtn"))
    ]
    assert found.predictions[1].tokens_per_second > found.predictions[0].tokens_per_second
    record = json.loads(json.dumps(found.to_dict()))
    assert record["predicted"] is True
    assert all(device["source"] for device in record["devices"])


@pytest.mark.parametrize(
    "text", ["b9000", "mine(tflops=1)", "h100(memory=0)", "h100(speed=3)", "h100(memory=x)", "(", ""]
)
def test_devices_that_cannot_be_are_refused(text):
    with pytest.raises(QuantlabError, match="device"):
        device_called(text)


def test_devices():
    assert {"h100", "a100", "rtx4090", "cpu"} <= set(device_names())
    assert device_called("a100(memory=40)").memory == 40 * GIB
    assert "changed" in device_called("a100(memory=40)").source
    assert device_called("mine(tflops=1,bandwidth=2,memory=3)").flops == 1e12
    given_figures = device_called("cpu(tflops=1,bandwidth=2,memory=3)")
    assert (given_figures.flops, given_figures.source) == (1e12, "as given")
    assert split_devices("h100, a100(memory=40,bandwidth=1555),cpu") == [
        "h100",
        "a100(memory=40,bandwidth=1555)",
        "cpu",
    ]


def test_the_processor_is_measured():
    found = device_called("cpu")
    assert "measured" in found.source
    assert found.link == 0
    assert found.bandwidth > 1e8


def test_what_cannot_be_predicted_is_refused(tmp_path):
    MambaConfig(vocab_size=80, hidden_size=16, num_hidden_layers=1, architectures=["MambaForCausalLM"]).save_pretrained(
        tmp_path
    )
    with pytest.raises(QuantlabError, match="cannot be predicted"):
        quantlab.roofline(tmp_path, None, "h100")
    for wrong in ({"tokens": 0}, {"kv_bits": 0}, {"devices": ()}, {"devices": "b9000"}):
        with pytest.raises(QuantlabError, match=r"tokens|kv_bits|device"):
            quantlab.roofline(tmp_path, None, **{"devices": "h100", **wrong})
    with pytest.raises(QuantlabError, match="does not exist"):
        quantlab.roofline(tmp_path / "none", None, "h100")
