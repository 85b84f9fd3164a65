"""What verification says of exports: sound ones pass to the last digits of float32, and one wrong number is seen."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from quantized_folders import RTN, SIZES, quantized, tiny
from safetensors.torch import load_file, save_file
from tokenizers_like import byte_level
from transformers import LlamaConfig, Qwen2Config

import quantlab
from quantlab.checkpoint.quantized import DIGEST
from quantlab.errors import CheckpointError
from quantlab.export import export
from quantlab.verification import loader, verify
from quantlab.verification.digest import Digest

PREDICTIONS = "its predictions are those of the codes"
# What a mean divergence had to stay below when exports were loaded in bfloat16.
FORMER_LIMIT = 2e-2


@pytest.fixture
def answers(in_process, monkeypatch):
    """What loaders answered, in order, and in which dtype they were asked to load."""
    seen = []
    answer = loader.answer

    def remembered(folder, dtype, digest):
        seen.append((dtype, digest, answer(folder, dtype, digest)))
        return seen[-1][2]

    monkeypatch.setattr(loader, "answer", remembered)
    return seen


def check_of(done, name=PREDICTIONS):
    return next(check for check in done.checks if check.name == name)


def exported(tmp_path, to, changes, config=None):
    """A folder of a tiny model with a tokenizer, and what was exported from it."""
    tiny(config or LlamaConfig(**SIZES)).save_pretrained(tmp_path / "model")
    byte_level("smollm").save_pretrained(tmp_path / "model")
    folder, out = tmp_path / "quantized", tmp_path / ("model.gguf" if to == "gguf" else "out")
    quantlab.quantize(tmp_path / "model", {**RTN, **changes}, folder)
    export(folder, to, out, settings={"fused": "any"} if to == "compressed-tensors" else None)
    return folder, out


FORMATS = {
    "int4": ({"format": "int4"}, "float32"),
    "int8": ({"format": "int8", "granularity": "channel"}, "float32"),
    "fp8": ({"format": "e4m3", "granularity": "channel"}, "float32"),
    "mxfp4": ({"format": "e2m1", "scale_dtype": "e8m0"}, "bfloat16"),
    "mixed": (
        {"format": "int4", "layers": {"*.o_proj": {"format": "e2m1", "scale_dtype": "e8m0"}}},
        "bfloat16",
    ),
    "nvfp4": ({"format": "e2m1", "granularity": 16, "scale_dtype": "e4m3"}, "bfloat16"),
    "w8a8": ({"format": "int8", "granularity": "channel", "activations": "int8"}, "float32"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_compressed_tensors_pass(name, tmp_path, answers):
    pytest.importorskip("compressed_tensors")
    changes, decoded = FORMATS[name]
    folder, out = exported(tmp_path, "compressed-tensors", changes)
    done = verify(out, folder)
    assert done.passed, done.failure
    answer = answers[0][2]
    assert answer["computed"] == "float32"
    assert set(answer["decoded"].values()) == ({decoded} - {"float32"})
    if name not in ("nvfp4", "w8a8"):  # scales of two levels are rounded by the library's own way; so are inputs
        far, allowed = (float(words.split()[0]) for words in check_of(done).detail.split("at most ")[1].split(", "))
        assert far < 2e-5 < allowed < 2e-3, "weights rounded to bfloat16 are held against the same"
    verify(folder)  # which leaves a digest there, that the next export takes along
    export(folder, "compressed-tensors", tmp_path / "again", settings={"fused": "any"})
    assert verify(tmp_path / "again").passed
    assert answers[-1][1].sensitivity is not None


def test_gguf_passes_and_leaves_nothing_behind(tmp_path, answers, monkeypatch):
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "cache"))
    folder, out = exported(tmp_path, "gguf", {"format": "int4", "symmetric": False}, Qwen2Config(**SIZES))
    done = verify(out, folder)
    assert done.passed, done.failure
    assert answers[0][0] == "float32"
    assert not [*(tmp_path / "cache" / "gguf").iterdir()]


class TestOneWrongNumber:
    """A change that no mean divergence would have shown, in one number of one layer, fails."""

    def fails(self, out, folder, answers):
        done = verify(out, folder)
        check = check_of(done)
        assert check.passed is False, check.detail
        _, digest, answer = answers[-1]
        assert digest.divergence(answer["logprobs"]) < FORMER_LIMIT / 4

    def edit(self, folder, name, change):
        shard = folder / "model.safetensors"
        tensors = load_file(shard)
        change(tensors[name])
        save_file(tensors, shard, metadata={"format": "pt"})

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("mlp.down_proj.weight_scale", lambda scales: scales[5, 1:2].mul_(1.1)),
            ("mlp.down_proj.weight_packed", lambda words: words[7, 3:4].bitwise_xor_(1 << 8)),
            ("self_attn.o_proj.weight_scale", lambda scales: scales[11, 0:1].neg_()),
            ("self_attn.v_proj.bias", lambda bias: bias[3:4].add_(0.05)),
        ],
        ids=["scale", "code", "sign", "bias"],
    )
    def test_of_compressed_tensors(self, name, change, tmp_path, answers):
        pytest.importorskip("compressed_tensors")
        folder, out = exported(tmp_path, "compressed-tensors", {"format": "int4"}, Qwen2Config(**SIZES))
        assert verify(out, folder).passed
        self.edit(out, f"model.layers.1.{name}", change)
        self.fails(out, folder, answers)

    @pytest.mark.parametrize("place", ["scale", "sign", "code"])
    def test_of_gguf(self, place, tmp_path, answers, monkeypatch):
        monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "cache"))
        folder, out = exported(tmp_path, "gguf", {"format": "int4"})
        reader = gguf.GGUFReader(out, "r+")
        (tensor,) = (each for each in reader.tensors if each.name == "blk.1.ffn_down.weight")
        assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0
        block = tensor.data[9][18:36]  # the second: a scale in float16, 32 codes
        if place == "code":
            block[4] ^= 1
        else:
            block[:2].view("<f2")[0] *= 1.1 if place == "scale" else -1
        reader.data.flush()
        self.fails(out, folder, answers)

    @pytest.mark.parametrize(
        ("leaf", "change"),
        [
            ("scales", lambda scales: scales[5, 1:2].mul_(1.1)),
            ("zeros", lambda zeros: zeros[5, 1:2].add_(1)),
            ("codes", lambda codes: codes[5, 3:4].bitwise_xor_(1)),
        ],
    )
    def test_of_ours_since_the_digest(self, leaf, change, tmp_path, in_process):
        folder = quantized(tmp_path, {"format": "int4", "symmetric": False})
        assert verify(folder).passed
        name = f"model.layers.1.mlp.down_proj.{leaf}"
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        tensors = load_file(folder / index[name])
        change(tensors[name])
        save_file(tensors, folder / index[name], metadata={"format": "pt"})
        assert check_of(verify(folder), "predictions are those of the stored digest").passed is False


class TestOlderDigests:
    def older(self, folder):
        """Make a folder's digest what it was before there were versions."""
        data = json.loads((folder / DIGEST).read_text())
        assert data.pop("version") == 2
        assert data.pop("sensitivity") > 0
        (folder / DIGEST).write_text(json.dumps(data))

    def test_of_a_folder_are_completed(self, tmp_path, in_process):
        folder = quantized(tmp_path, {"format": "int4"})
        verify(folder)
        now = Digest.stored(folder)
        self.older(folder)
        done = verify(folder)
        assert done.passed
        assert not any(check.passed is None for check in done.checks if "predictions" in check.name)
        assert Digest.stored(folder) == now

    def test_beside_an_export_serve_where_all_is_float32(self, tmp_path, in_process):
        pytest.importorskip("compressed_tensors")
        folder, _ = exported(tmp_path, "compressed-tensors", {"format": "int4"})
        verify(folder)
        export(folder, "compressed-tensors", tmp_path / "with")
        self.older(tmp_path / "with")
        assert check_of(verify(tmp_path / "with")).passed

    def test_beside_an_export_that_is_decoded_to_16_bits_cannot_tell(self, tmp_path, in_process):
        pytest.importorskip("compressed_tensors")
        folder, _ = exported(tmp_path, "compressed-tensors", {"format": "e2m1", "scale_dtype": "e8m0"})
        verify(folder)
        export(folder, "compressed-tensors", tmp_path / "with")
        self.older(tmp_path / "with")
        check = check_of(verify(tmp_path / "with"))
        assert check.passed is None
        assert "--against" in check.detail
        assert check_of(verify(tmp_path / "with", folder)).passed

    def test_newer_ones_are_refused(self, tmp_path, in_process):
        folder = quantized(tmp_path, {"format": "int4"})
        (folder / DIGEST).write_text(json.dumps({"version": 3}))
        with pytest.raises(CheckpointError, match=r"has version 3, this quantlab reads up to 2; upgrade it"):
            verify(folder)


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "gguf"])
def test_layers_that_were_rounded_again_are_told_and_not_held_against_the_codes(to, tmp_path, in_process, monkeypatch):
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "cache"))
    exported(tmp_path, "compressed-tensors", {"format": "int4"})
    nf4 = tmp_path / "nf4"
    quantlab.quantize(tmp_path / "model", {**RTN, "layers": {"*.1.mlp.*": {"format": "nf4"}}, "format": "int4"}, nf4)
    out = tmp_path / ("again.gguf" if to == "gguf" else "again")
    done = export(nf4, to, out, requantize=True)
    inexact = sum(not layer.exact for layer in done.layers)
    assert inexact == 3
    if to == "gptq":
        assert loader.inexact_layers(out) == 3
        return
    check = check_of(verify(out, nf4))
    assert check.passed is None
    assert "3 layers were made something else" in check.detail


def test_where_float32_has_no_room_the_models_own_dtype_is_taken(tmp_path, answers, monkeypatch):
    pytest.importorskip("compressed_tensors")
    folder, out = exported(tmp_path, "compressed-tensors", {"format": "int4"})
    full, half = (loader.bytes_needed(out, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half < full
    monkeypatch.setattr(loader, "enough_memory", lambda size: size <= half)
    done = verify(out, folder)
    assert done.passed
    assert answers[0][0] == "auto"
    assert answers[0][2]["computed"] == "bfloat16"
    assert "not in float32, which takes about" in done.checks[0].detail
    assert "computed in bfloat16" in check_of(done).detail
