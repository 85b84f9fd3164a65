"""The GPTQ layout, read by an unpacker that knows only the format's description."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantized_folders import SIZES, decoded, quantized, tiny
from safetensors.torch import load_file
from transformers import LlamaConfig

from quantlab.errors import CheckpointError
from quantlab.export import export
from quantlab.export.gptq import encode
from quantlab.numerics import QTensor, grid


def field(words: list[int], bits: int, index: int) -> int:
    """Field ``index`` of a little-endian bit stream in 32-bit words, bit by bit."""
    value = 0
    for bit in range(bits):
        position = index * bits + bit
        value |= (words[position // 32] >> (position % 32) & 1) << bit
    return value


def naive(tensors: dict[str, torch.Tensor], bits: int, version: int) -> torch.Tensor:
    """The weight ``[out, in]``, one element at a time: ``scales[g, n] * (u - zero)``."""
    to_unsigned = lambda tensor: [[word & 0xFFFFFFFF for word in row] for row in tensor.tolist()]  # noqa: E731
    columns = to_unsigned(tensors["qweight"].T)
    zero_rows = to_unsigned(tensors["qzeros"])
    scales, groups = tensors["scales"].float().tolist(), tensors["g_idx"].tolist()
    rows = []
    for n, words in enumerate(columns):
        row = []
        for i, g in enumerate(groups):
            zero = field(zero_rows[g], bits, n) + (1 if version == 1 else 0)
            row.append(scales[g][n] * (field(words, bits, i) - zero))
        rows.append(row)
    return torch.tensor(rows)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    groups=st.sampled_from([1, 2]),
    version=st.sampled_from([1, 2]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_naive_reader_finds_the_weight(bits, groups, version, symmetric, seed):
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    codes = torch.randint(0, 2**bits, (32, 64), generator=generator, dtype=torch.uint8)
    scales = torch.randn(32, groups, generator=generator).to(torch.float16)
    lowest = -half + (1 if version == 1 else 0)
    zeros = None
    if not symmetric:
        zeros = torch.randint(lowest, half, (32, groups), generator=generator, dtype=torch.int8)
    qtensor = QTensor(codes, scales, zeros, grid(f"int{bits}"))
    tensors, kind = encode(qtensor, version)
    assert kind == (bits, -1 if groups == 1 else 32, symmetric)
    assert tensors["qweight"].shape == (64 * bits // 32, 32)
    assert tensors["qzeros"].shape == (groups, 32 * bits // 32)
    assert torch.equal(naive(tensors, bits, version), qtensor.dequantize())


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_zeros_are_the_words_that_readers_look_for(bits, word):
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    tensors, _ = encode(QTensor(codes, torch.ones(32, 1, dtype=torch.float16), None, grid(f"int{bits}")))
    assert set(tensors["qzeros"].flatten().tolist()) == {word}


@pytest.mark.parametrize(
    ("changes", "version"),
    [
        ({"format": "int4"}, 1),
        ({"format": "int3", "granularity": "channel"}, 1),
        ({"format": "int4", "symmetric": False}, 2),
        ({"format": "int8", "layers": {"*.down_proj": {"format": "int4", "granularity": 64}}}, 1),
    ],
)
def test_a_model_is_written_whole(changes, version, tmp_path):
    folder = quantized(tmp_path, changes)
    done = export(folder, "gptq", tmp_path / "gptq", settings={"version": version})
    assert done.exact
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    described = config["quantization_config"]
    assert described == json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert described["checkpoint_format"] == ("gptq" if version == 1 else "gptq_v2")
    assert described["sym"] == changes.get("symmetric", True)
    assert described["block_name_to_quantize"] == "model.layers"
    expected = decoded(folder)
    for layer, weight in expected.items():
        override = described.get("dynamic", {}).get(f"+:^{layer.replace('.', chr(92) + '.')}$", described)
        parts = {leaf: tensors.pop(f"{layer}.{leaf}") for leaf in ("qweight", "qzeros", "scales", "g_idx")}
        assert torch.equal(naive(parts, override["bits"], version), weight)
        size = override["group_size"] if override["group_size"] > 0 else weight.shape[1]
        assert parts["g_idx"].tolist() == [i // size for i in range(weight.shape[1])]
    assert all(not name.startswith(tuple(expected)) for name in tensors)
    assert tensors["lm_head.weight"].shape == (300, 64)


class TestRefuses:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"format": "nf4"}, "no integers"),
            ({"format": "int5"}, "not 5"),
            ({"format": "int4", "scale_dtype": "float32", "scale_search": "mse"}, "no float16 numbers"),
        ],
    )
    def test_layers_that_it_cannot_hold(self, changes, reason, tmp_path):
        folder = quantized(tmp_path, changes)
        with pytest.raises(CheckpointError, match=rf"{reason}.*--requantize"):
            export(folder, "gptq", tmp_path / "gptq")
        assert not (tmp_path / "gptq").exists()
        done = export(folder, "gptq", tmp_path / "gptq", requantize=True)
        assert {layer.stored for layer in done.layers} <= {"4 bits, group 32", "8 bits, group 32"}

    def test_a_zero_of_0_in_version_1(self):
        zeros = torch.full((32, 1), -8, dtype=torch.int8)
        qtensor = QTensor(torch.zeros(32, 32, dtype=torch.uint8), torch.ones(32, 1), zeros, grid("int4"))
        with pytest.raises(CheckpointError, match="version=2"):
            encode(qtensor)
        assert torch.equal(naive(encode(qtensor, 2)[0], 4, 2), torch.zeros(32, 32))

    def test_versions_that_there_are_not(self, tmp_path):
        with pytest.raises(CheckpointError, match="versions 1 and 2"):
            export(quantized(tmp_path, {"format": "int4"}), "gptq", tmp_path / "gptq", settings={"version": 3})


@pytest.mark.parametrize(("symmetric", "version"), [(True, "gptq"), (False, "gptq_v2")])
def test_zeros_ask_for_the_version_that_can_hold_them(symmetric, version, tmp_path):
    folder = quantized(tmp_path, {"format": "int4", "symmetric": symmetric})
    export(folder, "gptq", tmp_path / "gptq")
    assert json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())["checkpoint_format"] == version


@pytest.mark.parametrize(
    ("pattern", "absent", "named"),
    [
        ("*.down_proj", {"mlp.down_proj"}, set()),
        ("*.0.mlp.down_proj", {"mlp.down_proj"}, {"model.layers.1.mlp.down_proj"}),
    ],
)
def test_transformers_is_told_which_layers_of_a_block_stay(pattern, absent, named, tmp_path):
    folder = quantized(tmp_path, {"format": "int4", "layers": {pattern: {"format": "none"}}})
    export(folder, "gptq", tmp_path / "gptq")
    described = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    ends = {end for ends in described["modules_in_block_to_quantize"] for end in ends}
    assert (
        ends
        == {
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        }
        - absent
        | named
    )


@pytest.mark.parametrize(
    ("changes", "settings", "said"),
    [
        ({"format": "int4", "symmetric": False}, {"version": 1}, "version 1, which GPTQModel refuses"),
        ({"format": "int8", "layers": {"*.down_proj": {"format": "int4"}}}, {}, "transformers ignores"),
        ({"format": "int4", "layers": {"lm_head": {"format": "int8"}}}, {}, "lm_head: quantized outside"),
    ],
)
def test_what_some_readers_cannot_is_said(changes, settings, said, tmp_path):
    model = tiny(LlamaConfig(**{**SIZES, "vocab_size": 320}))
    done = export(quantized(tmp_path, changes, model), "gptq", tmp_path / "gptq", settings=settings)
    assert any(said in note for note in done.notes)
