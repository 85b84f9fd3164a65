from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from quantlab.checkpoint.native import (
    FORMAT_VERSION,
    layer_tensors,
    parse_quantization_config,
    quantization_config,
    read_layer,
)
from quantlab.errors import CheckpointError
from quantlab.numerics import Grid, LowRank, QTensor, apply_scales, choose_scales, grid
from quantlab.storage import Storage


def qtensor(table: Grid, granularity=8, *, symmetric=True, dtype=torch.bfloat16, low_rank=False) -> QTensor:
    torch.manual_seed(0)
    weight = torch.randn(6, 24)
    stored = str(dtype).removeprefix("torch.")
    scales = choose_scales(weight, table, granularity, symmetric=symmetric, search=False, stored=stored)
    correction = LowRank(torch.randn(6, 2), torch.randn(2, 24)) if low_rank else None
    return replace(QTensor.of(apply_scales(weight, table, scales), scales, table), low_rank=correction)


OWN_TABLE = Grid("own-table", 3, torch.tensor([-4.0, -2.0, -0.5, 0.25, 3.0]))
FORMS = {
    "int4": qtensor(grid("int4")),
    "int3 with zeros": qtensor(grid("int3"), "channel", symmetric=False),
    "own table": qtensor(OWN_TABLE, "tensor", dtype=torch.float32),
    "own table with zeros": qtensor(OWN_TABLE, symmetric=False, dtype=torch.float16),
    "low rank": qtensor(grid("int2"), low_rank=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_layers_go_through_tensors(form):
    q = FORMS[form]
    tensors = layer_tensors("a.b", q)
    assert all(name.startswith("a.b.") for name in tensors)
    back = read_layer(tensors, "a.b", Storage.of(q))
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scales, q.scales)
    assert torch.equal(back.dequantize(), q.dequantize())
    assert back.grid.name == q.grid.name
    assert Storage.of(back) == Storage.of(q)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_counted_is_what_is_stored(form):
    tensors = layer_tensors("a", FORMS[form]).values()
    assert 8 * sum(t.numel() * t.element_size() for t in tensors) == FORMS[form].stored_bits()


def test_config_goes_through_json_and_groups_layers_stored_alike():
    layers = {f"layers.{i}.{name}": Storage.of(q, bias=i > 3) for i in range(6) for name, q in FORMS.items()}
    config = json.loads(json.dumps(quantization_config(layers)))
    assert parse_quantization_config(config) == layers
    assert config["quant_method"] == "quantlab"
    assert len(config["layers"]) == 2 * len(FORMS)
    assert quantization_config(dict(reversed(layers.items()))) == config


def test_refuses_a_newer_format():
    config = {**quantization_config({}), "format_version": FORMAT_VERSION + 1, "quantlab_version": "9.9"}
    with pytest.raises(CheckpointError, match=r"written by quantlab 9\.9.*upgrade"):
        parse_quantization_config(config)


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "gptq"},
        {"format_version": None},
        {"format_version": 0},
        {"layers": [{"layers": ["a"]}]},
        {"layers": [{**Storage.of(FORMS["int4"]).to_dict()}]},
        {"layers": ["a"]},
    ],
)
def test_refuses_configs_that_it_cannot_read(change):
    with pytest.raises(CheckpointError):
        parse_quantization_config({**quantization_config({"a": Storage.of(FORMS["int4"])}), **change})


def test_refuses_missing_and_unfitting_tensors():
    q = FORMS["int3 with zeros"]
    tensors, storage = layer_tensors("a", q), Storage.of(q)
    for name in tensors:
        with pytest.raises(CheckpointError, match=f"no tensor {name}"):
            read_layer({key: t for key, t in tensors.items() if key != name}, "a", storage)
        with pytest.raises(CheckpointError, match=f"{name}: the checkpoint has"):
            read_layer({**tensors, name: tensors[name][..., :-1]}, "a", storage)
        with pytest.raises(CheckpointError, match=f"{name}: the checkpoint has"):
            read_layer({**tensors, name: tensors[name].double()}, "a", storage)


def test_refuses_a_table_that_is_not_the_formats():
    q = FORMS["int4"]
    tensors = layer_tensors("a", q)
    tensors["a.table"] = tensors["a.table"] + 1
    with pytest.raises(CheckpointError, match=r"a\.table: .* int4"):
        read_layer(tensors, "a", Storage.of(q))


def test_refuses_codes_beyond_the_table():
    q = FORMS["own table"]
    tensors = layer_tensors("a", q)
    tensors["a.codes"] = torch.full_like(tensors["a.codes"], 255)
    with pytest.raises(CheckpointError, match=r"code 7 is beyond its 5 values"):
        read_layer(tensors, "a", Storage.of(q))
