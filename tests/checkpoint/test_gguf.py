"""A GGUF file imported: the weights are those in the file, and nothing odd about it goes unnoticed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf_files import HEADS, HIDDEN, INNER, KV, TEMPLATE, VOCAB, load, logits, make_llama, rounded, stored, write_gguf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Lfm2Config, Qwen3MoeConfig

from quantlab.checkpoint.cache import cache_dir
from quantlab.checkpoint.gguf import cached_gguf, import_gguf
from quantlab.errors import CheckpointError


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_are_those_of_the_dequantized_weights(tmp_path, kind, tied):
    model = make_llama(tied)
    path = write_gguf(tmp_path / "tiny.gguf", stored(model, "llama"), kind)
    folder = import_gguf(path, tmp_path / "out", dtype=torch.float32)
    found = load(folder)
    assert torch.equal(logits(found), logits(rounded(model, kind)))
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != tied


def test_agrees_with_transformers_own_loader(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", stored(make_llama(), "llama"), Q.Q4_0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    ours = load(import_gguf(path, tmp_path / "out", dtype=torch.float32))
    assert torch.equal(logits(ours), logits(theirs))


def test_folder_is_in_the_dtype_asked_for_with_config_and_tokenizer(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", stored(make_llama(), "llama"), Q.F16, pre="smollm")
    seen = []
    folder = import_gguf(path, tmp_path / "out", progress=lambda *step: seen.append(step))
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert [step[0] for step in seen] == list(range(1, len(weights) + 1))
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["rope_parameters"]["rope_theta"] == 50000.0
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 261
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|bos|>", "<|eos|>")
    assert tokenizer.model_max_length == 256
    text = "the  12 été\n<|eos|>"
    # SmolLM's splitter takes the digits out first, so both spaces before them are one token.
    assert tokenizer.tokenize(text)[:6] == ["t", "he", "ĠĠ", "1", "2", "Ġ"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_neighbouring_files_do_not_leak_into_the_import(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", stored(make_llama(), "llama"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|wrong|>", "chat_template": "wrong"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = AutoTokenizer.from_pretrained(import_gguf(path, tmp_path / "out"))
    assert (tokenizer.bos_token, tokenizer.chat_template) == ("<|bos|>", TEMPLATE)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_shards_hold_the_same_model(tmp_path, tied):
    path = write_gguf(tmp_path / "tiny.gguf", stored(make_llama(tied), "llama"), Q.Q8_0)
    one = import_gguf(path, tmp_path / "one", dtype=torch.float32)
    many = import_gguf(path, tmp_path / "many", dtype=torch.float32, max_shard_size=100_000)
    shards = sorted(many.glob("*.safetensors"))
    assert len(shards) > 2
    assert [shard.name for shard in shards][-1] == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    assert all(shard.stat().st_size < 110_000 for shard in shards)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    whole = load_file(one / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in whole.values())
    assert torch.equal(logits(load(many)), logits(load(one)))


def test_existing_import_is_reused_until_the_file_or_the_dtype_changes(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", stored(make_llama(), "llama"))
    folder = import_gguf(path, tmp_path / "out")
    first = (folder / "model.safetensors").stat().st_ino
    assert import_gguf(path, tmp_path / "out") == folder
    assert (folder / "model.safetensors").stat().st_ino == first
    import_gguf(path, tmp_path / "out", dtype=torch.float16)
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.float16}
    os.utime(path, ns=(0, time.time_ns() + 10**9))
    import_gguf(path, tmp_path / "out", dtype=torch.float32)
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.float32}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny.gguf"]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", stored(make_llama(), "llama"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="no GGUF import wrote it"):
        import_gguf(path, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_cache(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", stored(make_llama(), "llama"))
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "cache"))
    folder = cached_gguf(path)
    assert folder == cached_gguf(path)
    assert folder.parent == tmp_path / "cache" / "gguf"
    os.utime(path, ns=(0, 1))
    assert cached_gguf(path) != folder
    monkeypatch.delenv("QUANTLAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "quantlab"


def damaged(path: Path, how: str) -> Path:
    tensors = stored(make_llama(), "llama")
    if how == "missing tensor":
        del tensors["blk.1.ffn_up.weight"]
    if how == "tensor without a place":
        tensors["blk.0.ffn_up.bias"] = np.zeros(HIDDEN, np.float32)
    if how == "wrong shape":
        tensors["blk.0.ffn_up.weight"] = np.zeros((INNER, HIDDEN // 2), np.float32)
    scaling = [("add_rope_scaling_type", gguf.RopeScalingType.YARN), ("add_rope_scaling_factor", 4.0)]
    metadata = scaling if how == "yarn" else []
    write_gguf(path, tensors, Q.F16, "clip" if how == "unknown architecture" else "llama", metadata)
    content = path.read_bytes()
    if how == "truncated data":
        path.write_bytes(content[:-1000])
    if how == "truncated header":
        path.write_bytes(content[:2000])
    if how == "wrong magic":
        path.write_bytes(b"GGML" + content[4:])
    if how == "empty":
        path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated data", "not a complete GGUF file"),
        ("truncated header", "not a complete GGUF file"),
        ("wrong magic", "not a complete GGUF file"),
        ("empty", "not a complete GGUF file"),
        ("unknown architecture", "cannot read architecture 'clip'"),
        ("missing tensor", r"model\.layers\.1\.mlp\.up_proj\.weight"),
        ("tensor without a place", r"blk\.0\.ffn_up\.bias has no place in LlamaForCausalLM"),
        ("wrong shape", r"blk\.0\.ffn_up\.weight .* shape \[128, 32\], the model wants \[128, 64\]"),
        ("yarn", "drops its rope scaling 'yarn' by 4"),
    ],
)
def test_odd_files_are_refused_and_leave_nothing(tmp_path, how, said):
    path = damaged(tmp_path / "odd.gguf", how)
    with pytest.raises(CheckpointError, match=said):
        import_gguf(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["odd.gguf"]


def test_no_such_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.gguf: no such file"):
        import_gguf(tmp_path / "absent.gguf", tmp_path / "out")


def test_llama3_rope_scaling_is_recovered_from_the_factors(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = make_llama(**rope, original_max_position_embeddings=8192)
    plain = 50000.0 ** (-torch.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert factors.max() == pytest.approx(8)
    tensors = stored(model, "llama") | {"rope_freqs.weight": factors.astype(np.float32)}
    found = load(import_gguf(write_gguf(tmp_path / "a.gguf", tensors), tmp_path / "a", dtype=torch.float32))
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)
    tensors["rope_freqs.weight"] = factors[::-1].astype(np.float32)
    with pytest.raises(CheckpointError, match="not llama3 rope scaling"):
        import_gguf(write_gguf(tmp_path / "b.gguf", tensors), tmp_path / "b")


def make_moe() -> torch.nn.Module:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        norm_topk_prob=True,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    )
    return AutoModelForCausalLM.from_config(config).eval()


MOE = [("add_expert_count", 4), ("add_expert_used_count", 2), ("add_expert_feed_forward_length", 32)]


def test_experts_come_apart_as_in_a_hugging_face_checkpoint(tmp_path):
    model = make_moe()
    path = write_gguf(tmp_path / "moe.gguf", stored(model, "qwen3moe"), Q.F32, "qwen3moe", MOE)
    folder = import_gguf(path, tmp_path / "out", dtype=torch.float32)
    weights = load_file(folder / "model.safetensors")
    stacked = model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(weights["model.layers.1.mlp.experts.3.up_proj.weight"], stacked[3, 32:])
    assert torch.equal(logits(load(folder)), logits(model))


def test_half_of_stacked_experts_is_refused(tmp_path):
    tensors = stored(make_moe(), "qwen3moe")
    del tensors["blk.1.ffn_up_exps.weight"]
    path = write_gguf(tmp_path / "moe.gguf", tensors, Q.F32, "qwen3moe", MOE)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up_exps is not in the file"):
        import_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("drop", [None, "blk.1.shortconv.conv.weight"])
def test_an_architecture_of_the_newer_reader(tmp_path, drop):
    config = Lfm2Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        layer_types=["full_attention", "conv"],
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    tensors = stored(model, "lfm2")
    tensors.pop(drop, None)
    path = write_gguf(tmp_path / "a.gguf", tensors, Q.F32, "lfm2", [("add_shortconv_l_cache", 3)], kv=[KV, 0])
    if drop:
        with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.1\.conv\.conv\.weight"):
            import_gguf(path, tmp_path / "out")
    else:
        assert torch.equal(logits(load(import_gguf(path, tmp_path / "out", dtype=torch.float32))), logits(model))
