"""GGUF files of tiny models, written independently of the importer, and what they are to be compared with."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Q
from transformers import AutoModelForCausalLM, LlamaConfig

VOCAB, HIDDEN, INNER, HEADS, KV = 300, 64, 128, 4, 2
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
NAMES = {  # llama.cpp's names, written out so that a wrong map in transformers would show
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    # LFM2
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "conv.conv": "shortconv.conv",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
}
OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.embedding_norm": "token_embd_norm",
    "lm_head": "output",
}


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in a GPT-2 vocabulary, in byte order."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


def add_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    merges = ["Ġ t", "h e", "Ġt he", "Ġ Ġ"]
    tokens = byte_alphabet() + [merge.replace(" ", "") for merge in merges] + ["<|bos|>", "<|eos|>"]
    types = [1] * (len(tokens) - 2) + [3, 3]
    while len(tokens) < VOCAB:
        tokens.append(f"<unused{len(tokens)}>")
        types.append(3)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(260)
    writer.add_eos_token_id(261)
    writer.add_chat_template(TEMPLATE)


def gguf_name(name: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    if stem in OUTER:
        return f"{OUTER[stem]}.{suffix}"
    _, _, block, inner = stem.split(".", 3)
    return f"blk.{block}.{NAMES[inner]}.{suffix}"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q and k as llama.cpp's converter orders them for its rope."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def stored(model: torch.nn.Module, architecture: str) -> dict[str, np.ndarray]:
    """The model's weights with the names and layouts of a GGUF file."""
    tensors = {}
    for name, value in model.state_dict().items():
        weight = value.float().numpy()
        if ".mlp.experts." in name:
            block = name.split(".")[2]
            parts = {"down": weight}
            if "gate_up" in name:
                parts = dict(zip(("gate", "up"), np.split(weight, 2, axis=1), strict=True))
            tensors |= {f"blk.{block}.ffn_{part}_exps.weight": np.array(w) for part, w in parts.items()}
            continue
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            weight = permuted(weight, HEADS if "q_proj" in name else KV)
        tensors[gguf_name(name)] = np.array(weight.squeeze())
    if model.config.tie_word_embeddings:
        del tensors["output.weight"]
    return tensors


def write_gguf(path, tensors, kind=Q.F32, architecture="llama", metadata=(), pre="default", kv=KV):
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(2)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(kv)
    writer.add_key_length(HIDDEN // HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    for key, value in metadata:
        getattr(writer, key)(value)
    add_tokenizer(writer, pre)
    for name, tensor in tensors.items():
        form = Q.F32 if tensor.ndim == 1 else kind
        writer.add_tensor(name, gguf.quants.quantize(tensor, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_llama(tied: bool = False, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0} | changes,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def rounded(model: torch.nn.Module, kind: Q) -> torch.nn.Module:
    """The model with every matrix gone through `kind` and back. Permuting rows does not change the blocks."""
    for weight in model.parameters():
        if weight.ndim > 1:
            blocks = gguf.quants.quantize(weight.detach().numpy(), kind)
            weight.data = torch.from_numpy(np.array(gguf.quants.dequantize(blocks, kind)))
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.arange(40)[None] * 7 % VOCAB).logits


def load(folder: Path) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()
