"""Models exported to GGUF, read back by our own reader (through transformers' tables) and by the gguf package."""

from __future__ import annotations

from itertools import pairwise

import gguf
import numpy as np
import pytest
import torch
from quantized_folders import RTN, SIZES, decoded, logits, tiny
from safetensors.torch import save_file
from tokenizers_like import PRE, TEXT, byte_level, pieces
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
)

import quantlab
from quantlab.checkpoint.gguf import import_gguf
from quantlab.checkpoint.quantized import QuantizedFolder
from quantlab.errors import CheckpointError
from quantlab.export import export
from quantlab.export.gguf_exact import exact_blocks
from quantlab.export.gguf_rope import llama3_divisors
from quantlab.export.importance import importance_of
from quantlab.numerics import QTensor, grid

TIED = {**SIZES, "tie_word_embeddings": True}
HEADS = {**TIED, "head_dim": 16, "query_pre_attn_scalar": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied-biased": LlamaConfig(**{**SIZES, "tie_word_embeddings": True, "attention_bias": True}),
    "mistral": MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "gemma2": Gemma2Config(**TIED, head_dim=16, sliding_window=32, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(
        **{**TIED, "num_hidden_layers": 6}, head_dim=16, sliding_window=32, query_pre_attn_scalar=16
    ),
    "phi3": Phi3Config(**SIZES),
    "starcoder2": Starcoder2Config(**SIZES),
    "stablelm": StableLmConfig(**SIZES),
}


def written(tmp_path, changes, config=None, tokenizer=None, dtype=torch.bfloat16):
    """A quantized folder with a tokenizer."""
    tiny(config or MODELS["llama"], dtype).save_pretrained(tmp_path / "model")
    (tokenizer or byte_level("smollm")).save_pretrained(tmp_path / "model")
    quantlab.quantize(tmp_path / "model", {**RTN, **changes}, tmp_path / "quantized")
    return tmp_path / "quantized"


def stored_types(path):
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", MODELS)
def test_our_own_reader_finds_the_same_weights_and_logits(name, tmp_path):
    folder = written(tmp_path, {"format": "int4"}, MODELS[name])
    done = export(folder, "gguf", tmp_path / "model.gguf")
    assert done.exact
    assert {layer.stored for layer in done.layers} == {"Q4_0"}
    back = import_gguf(tmp_path / "model.gguf", tmp_path / "back", dtype=torch.float32)
    found = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32).eval()
    ours = quantlab.load(folder, dtype=torch.float32)
    weights = dict(found.named_parameters())
    for layer, weight in decoded(folder).items():
        assert torch.equal(weights[f"{layer}.weight"], weight), layer
    for parameter, value in ours.named_parameters():
        assert torch.equal(weights[parameter], value), parameter
    torch.testing.assert_close(logits(found), logits(ours), rtol=1e-3, atol=1e-4 * float(logits(ours).std()))


@pytest.mark.parametrize(
    ("changes", "stored"),
    [
        ({"format": "int4", "granularity": 64}, {"Q4_0"}),
        ({"format": "int4", "granularity": "channel"}, {"Q4_0"}),
        ({"format": "int3"}, {"Q4_0"}),
        ({"format": "int5"}, {"Q5_0"}),
        ({"format": "int8"}, {"Q8_0"}),
        ({"format": "int4", "symmetric": False}, {"Q4_1", "Q5_0"}),
        ({"format": "int3", "symmetric": False}, {"Q4_0"}),
        ({"format": "e2m1", "scale_dtype": "e8m0"}, {"MXFP4"}),
        ({"format": "e2m1", "scale_dtype": "float16"}, {"Q5_0"}),
        ({"format": "e2m3", "granularity": "channel"}, {"Q8_0"}),
    ],
)
def test_codes_stay_where_a_block_has_their_grid(changes, stored, tmp_path):
    folder = written(tmp_path, changes)
    done = export(folder, "gguf", tmp_path / "model.gguf")
    assert done.exact
    assert {layer.stored for layer in done.layers} <= stored
    back = import_gguf(tmp_path / "model.gguf", tmp_path / "back", dtype=torch.float32)
    weights = dict(AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32).named_parameters())
    for layer, weight in decoded(folder).items():
        assert torch.equal(weights[f"{layer}.weight"], weight), layer


@pytest.mark.parametrize(
    ("format", "size", "kind"),
    [("int2", 256, "q2_k"), ("int3", 512, "q3_k"), ("int6", 256, "q6_k"), ("int6", 128, "q8_0")],
)
def test_wide_groups_lie_in_k_blocks(format, size, kind):
    g = torch.Generator().manual_seed(0)
    bits = int(format[-1])
    codes = torch.randint(0, 2**bits, (3, 512), generator=g, dtype=torch.uint8)
    codes[0, :2] = torch.tensor([0, 2**bits - 1])
    qtensor = QTensor(codes, torch.randn(3, 512 // size, generator=g).half(), None, grid(format))
    data, found = exact_blocks(qtensor)
    assert found == kind
    back = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    assert torch.equal(torch.from_numpy(back), qtensor.dequantize())


def test_types_can_be_asked_for_by_name_from_the_original_with_importance(tmp_path):
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 512}
    folder = written(tmp_path, {"format": "nf4"}, LlamaConfig(**sizes))
    importance = {f"model.layers.{i}.mlp.down_proj": torch.rand(512) ** 4 for i in range(2)}
    save_file(importance, tmp_path / "importance.safetensors")
    settings = {
        "types": {"model.layers.*": "q4_k", "*.down_proj": "q3_k", "model.embed_tokens": "q6_k", "*.v_proj": "q8_0"},
        "original": str(tmp_path / "model"),
    }
    export(folder, "gguf", tmp_path / "plain.gguf", settings=settings)
    settings["importance"] = str(tmp_path / "importance.safetensors")
    done = export(folder, "gguf", tmp_path / "model.gguf", settings=settings)
    assert {layer.stored for layer in done.layers} == {"Q4_K", "Q3_K", "Q8_0"}
    assert all("from the original" in layer.note for layer in done.layers)
    types = stored_types(tmp_path / "model.gguf")
    assert types["token_embd.weight"] == "Q6_K"
    assert types["blk.1.ffn_down.weight"] == "Q3_K"
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    weight = original.model.layers[0].mlp.down_proj.weight.detach()
    counted = importance["model.layers.0.mlp.down_proj"]
    costs = {}
    for name in ("plain", "model"):
        reader = gguf.GGUFReader(tmp_path / f"{name}.gguf")
        tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight")
        found = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        costs[name] = float(((found - weight).square() * counted).sum())
    assert costs["model"] < costs["plain"]


def test_importance_is_measured_on_the_recipes_data(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(TEXT * 40))
    calibration = {"source": str(tmp_path / "text.txt"), "samples": 4, "length": 32}
    folder = written(tmp_path, {"format": "int4", "calibration": calibration})
    settings = {"original": str(tmp_path / "model"), "importance": "measure", "types": {"model.layers.*": "q5_0"}}
    seen = importance_of(QuantizedFolder(folder), "measure", settings["original"])
    assert set(seen) == set(decoded(folder))
    assert torch.equal(seen["model.layers.0.self_attn.q_proj"], seen["model.layers.0.self_attn.v_proj"])
    assert seen["model.layers.0.self_attn.q_proj"].shape == (64,)
    assert (seen["model.layers.0.self_attn.q_proj"] > 0).all()
    done = export(folder, "gguf", tmp_path / "model.gguf", settings=settings)
    assert {layer.stored for layer in done.layers} == {"Q5_0"}
    with pytest.raises(CheckpointError, match="--set original=MODEL"):
        export(folder, "gguf", tmp_path / "other.gguf", settings={"importance": "measure"})


def test_layers_can_be_stored_decoded(tmp_path):
    folder = written(tmp_path, {"format": "nf4"})
    done = export(folder, "gguf", tmp_path / "model.gguf", settings={"types": {"*": "f32", "*.v_proj": "bf16"}})
    assert [layer.exact for layer in done.layers if not layer.layer.endswith("v_proj")] == [True] * 12
    back = import_gguf(tmp_path / "model.gguf", tmp_path / "back", dtype=torch.float32)
    weights = dict(AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32).named_parameters())
    for layer, weight in decoded(folder).items():
        expected = weight.bfloat16().float() if layer.endswith("v_proj") else weight
        assert torch.equal(weights[f"{layer}.weight"], expected)


@pytest.mark.parametrize("pre", PRE)
def test_byte_level_tokenizers_come_back(pre, tmp_path):
    tokenizer = byte_level(pre)
    folder = written(tmp_path, {"format": "int4"}, tokenizer=tokenizer)
    export(folder, "gguf", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.get_field("tokenizer.ggml.pre").contents() == pre
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert types[:3] == [3, 3, 3]
    assert set(types[3:290]) == {1}
    assert set(types[290:]) == {5}
    back = AutoTokenizer.from_pretrained(import_gguf(tmp_path / "model.gguf", tmp_path / "back"))
    assert back.chat_template == tokenizer.chat_template
    assert (back.bos_token, back.eos_token) == ("<s>", "</s>")
    if pre != "gpt-2":  # of its digits transformers' reader knows no rule
        for text in [*TEXT[:1], "12 345 the", "don't STOP</s>"]:
            assert back(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers_keep_scores_bytes_and_prefix(prefix, tmp_path):
    tokenizer = pieces(prefix)
    folder = written(tmp_path, {"format": "int4"}, tokenizer=tokenizer)
    export(folder, "gguf", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    field = lambda name: reader.get_field(f"tokenizer.ggml.{name}").contents()  # noqa: E731
    assert field("model") == "llama"
    assert field("add_space_prefix") is prefix
    assert field("token_type")[:4] == [2, 3, 3, 6]
    tokens, scores = field("tokens"), field("scores")
    assert spm(tokens, scores, "▁" * prefix + TEXT[0].replace(" ", "▁")) == tokenizer(TEXT[0])["input_ids"]


def spm(tokens: list[str], scores: list[float], text: str) -> list[int]:
    """SentencePiece's BPE, naively: join the neighbours whose piece has the highest score, the leftmost of equals."""
    index = {token: i for i, token in enumerate(tokens)}
    parts = list(text)
    while True:
        joined = [(scores[index[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in index]
        if not joined:
            break
        at = -max(joined)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    ids = []
    for part in parts:
        ids += [index[part]] if part in index else [index[f"<0x{byte:02X}>"] for byte in part.encode()]
    return ids


def test_llama_3_rope_is_stored_as_divisors(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(**SIZES, rope_parameters=rope)
    folder = written(tmp_path, {"format": "int4"}, config)
    export(folder, "gguf", tmp_path / "model.gguf")
    stored = next(t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "rope_freqs.weight")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** (-torch.arange(8) / 8)
    torch.testing.assert_close(torch.from_numpy(np.array(stored.data)), plain / scaled)
    assert np.array_equal(stored.data, llama3_divisors(rope, 16, 10000.0))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MistralConfig(**SIZES, head_dim=16, sliding_window=64), "no sliding window in llama: beyond 64 tokens"),
        (Phi3Config(**SIZES, sliding_window=100), "no sliding window in phi3: beyond 100 tokens"),
        (MistralConfig(**SIZES, head_dim=16, sliding_window=SIZES["max_position_embeddings"]), None),
        (Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=64), None),
        (MODELS["gemma2"], None),
    ],
)
def test_windows_that_llama_cpp_does_not_have_are_told(config, said, tmp_path):
    done = export(written(tmp_path, {"format": "int4"}, config), "gguf", tmp_path / "model.gguf")
    assert [said in note for note in done.notes] == [True] if said else not done.notes


BIASED = {**RTN, "format": "int4", "compensation": "bias"}


def test_biases_that_a_compensation_added_are_read_back(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(TEXT * 40))
    calibration = {"source": str(tmp_path / "text.txt"), "samples": 4, "length": 32}
    folder = written(tmp_path, {**BIASED, "calibration": calibration})
    assert export(folder, "gguf", tmp_path / "model.gguf").exact
    back = import_gguf(tmp_path / "model.gguf", tmp_path / "back", dtype=torch.float32)
    found = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    assert found.model.layers[1].mlp.down_proj.bias.abs().max() > 0
    ours = logits(quantlab.load(folder, dtype=torch.float32))
    torch.testing.assert_close(logits(found), ours, rtol=1e-3, atol=1e-4 * float(ours.std()))


class TestRefuses:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"format": "nf4"}, "no whole multiples"),
            ({"format": "int4", "granularity": 16}, "groups of 16"),
            ({"format": "int4", "scale_dtype": "float32", "scale_search": "mse"}, "no float16 numbers"),
            ({"format": "int4", "compensation": "lorc", "compensation_options": {"rank": 2}}, "low-rank correction"),
        ],
    )
    def test_layers_that_no_block_holds(self, changes, reason, tmp_path):
        folder = written(tmp_path, changes)
        with pytest.raises(CheckpointError, match=rf"model\.layers\..*{reason}.*--requantize"):
            export(folder, "gguf", tmp_path / "model.gguf")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "quantized"]
        done = export(folder, "gguf", tmp_path / "model.gguf", requantize=True)
        assert {layer.stored for layer in done.layers} == {"Q4_0"}  # rows of 64 are no blocks of 256
        assert all(reason in layer.note for layer in done.layers)
        back = import_gguf(tmp_path / "model.gguf", tmp_path / "back", dtype=torch.float32)
        weights = dict(AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32).named_parameters())
        for layer, weight in decoded(folder).items():
            error = weights[f"{layer}.weight"] - weight
            assert error.square().sum() < 0.02 * weight.square().sum(), layer

    def test_an_original_that_was_rewritten(self, tmp_path):
        folder = written(tmp_path, {"format": "int4"})
        recipe = (folder / "recipe.yaml").read_text().replace("transforms: {}", "transforms: {hadamard: {}}")
        (folder / "recipe.yaml").write_text(recipe)
        with pytest.raises(CheckpointError, match="rewritten by hadamard"):
            export(folder, "gguf", tmp_path / "model.gguf", settings={"original": str(tmp_path / "model")})

    def test_folders_without_a_tokenizer(self, tmp_path):
        folder = written(tmp_path, {"format": "int4"})
        for file in folder.glob("tokenizer*"):
            file.unlink()
        with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
            export(folder, "gguf", tmp_path / "model.gguf")

    def test_architectures_without_a_layout(self, tmp_path):
        config = GPTNeoXConfig(
            vocab_size=300, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
        )
        folder = written(tmp_path, {"format": "int4"}, config)
        with pytest.raises(CheckpointError, match=r"'gpt_neox'.*knows no GGUF layout"):
            export(folder, "gguf", tmp_path / "model.gguf")

    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            (Gemma3TextConfig(**{**HEADS, "query_pre_attn_scalar": 32}, sliding_window=32), "query_pre_attn_scalar 32"),
            (Gemma3TextConfig(**HEADS, sliding_window=32, layer_types=["full_attention"] * 2), "every 6th layer"),
            (Gemma2Config(**HEADS, attn_logit_softcapping=None), "attn_logit_softcapping None"),
            (Gemma2Config(**HEADS, attention_bias=True), r"self_attn\.\w+\.bias: llama.cpp has no such bias"),
            (Gemma2Config(**HEADS, hidden_activation="silu"), "'silu': llama.cpp always takes gelu"),
            (LlamaConfig(**SIZES, hidden_act="gelu"), "hidden_act 'gelu': llama.cpp always takes silu in llama"),
            (Qwen3Config(**SIZES, head_dim=16, attention_bias=True), r"\.bias: llama.cpp has no such bias in qwen3"),
            (Starcoder2Config(**SIZES, use_bias=False), "has no bias, and llama.cpp does not load a starcoder2"),
            (LlamaConfig(**SIZES, rope_parameters=LONGROPE), "'longrope': llama.cpp has it for phi3 only"),
            (LlamaConfig(**SIZES, rope_parameters={**YARN, "beta_fast": 16.0}), "beta_fast 16.0: llama.cpp takes 32"),
            (LlamaConfig(**SIZES, rope_parameters={**YARN, "truncate": False}), "truncate False"),
        ],
    )
    def test_what_llama_cpp_would_compute_otherwise(self, config, reason, tmp_path):
        folder = written(tmp_path, {"format": "int4"}, config)
        with pytest.raises(CheckpointError, match=reason):
            export(folder, "gguf", tmp_path / "model.gguf")
        assert not list(tmp_path.glob("*.gguf*"))

    def test_tokenizers_that_cut_text_in_unknown_ways(self, tmp_path):
        from tokenizers import pre_tokenizers

        tokenizer = byte_level("gpt-2")
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        folder = written(tmp_path, {"format": "int4"}, tokenizer=tokenizer)
        with pytest.raises(CheckpointError, match=r"Punctuation then byte-level.*--set pre=NAME"):
            export(folder, "gguf", tmp_path / "model.gguf")
        export(folder, "gguf", tmp_path / "model.gguf", settings={"pre": "gpt-2"})

    def test_names_and_types_that_there_are_not(self, tmp_path):
        folder = written(tmp_path, {"format": "int4"})
        with pytest.raises(CheckpointError, match=r"ends in \.gguf"):
            export(folder, "gguf", tmp_path / "model")
        with pytest.raises(CheckpointError, match="'q7_k' is none of"):
            export(folder, "gguf", tmp_path / "model.gguf", settings={"types": {"*": "q7_k"}})
