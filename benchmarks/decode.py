"""Tokens a second of a Llama of a billion weights: ours at a few bits, transformers in bfloat16, llama.cpp, in turns.

    python benchmarks/decode.py [--model DIR] [--format int4 fp6] [--layers 16] [--new 32] [--rounds 5] [--threads 2]

The weights are random and made here (hidden size 2048, vocabulary 32000), so nothing is fetched; `--model` takes a real
model instead. The head is quantized, too. llama.cpp runs the same weights as Q4_0 where `llama_cpp` can be imported.
Every round gives each of them one turn: a prompt, then tokens one by one; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize as gguf_quantize
from quantlab_evals import EvalError, GreedyDecoder, Timing, describe_machine, stream_bandwidth, timed
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import quantlab
from quantlab.nn import QuantLinear
from quantlab.numerics import QTensor, Sample, apply_scales, choose_scales, format_called

BASE = "bf16 generate"
Turn = Callable[[], tuple[float, float]]
"""Decode once; returns wall-clock and processor seconds of a token."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", help="a real model instead of random weights")
    options.add_argument(
        "--format", nargs="+", default=("int4",), help="as recipes have them; fp6 is e3m2, a scale a row"
    )
    options.add_argument("--group", type=int, default=64)
    options.add_argument("--layers", type=int, default=16)
    options.add_argument("--prompt", type=int, default=16)
    options.add_argument("--new", type=int, default=32)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    original = quantlab.load(chosen.model) if chosen.model else random_llama(chosen.layers)
    weights = sum(parameter.numel() for parameter in original.parameters())
    print(f"{describe_machine()}\nmemory is read at {stream_bandwidth() / 1e9:.1f} GB/s; {weights / 1e6:.0f} M weights")
    prompt = torch.arange(3, 3 + chosen.prompt).unsqueeze(0)
    turns: dict[str, Turn] = {BASE: generating(original, prompt, chosen.new)}
    turns |= decoders("bf16", original, prompt, chosen.new)
    for name in chosen.format:
        turns |= decoders(name, quantized(original, name, chosen.group), prompt, chosen.new)
    with tempfile.TemporaryDirectory() as folder:
        if importlib.util.find_spec("llama_cpp") and isinstance(original, LlamaForCausalLM):
            file = write_gguf(original, Path(folder) / "model.gguf")
            turns["llama.cpp Q4_0"] = llama_cpp_turn(file, prompt[0].tolist(), chosen.new, chosen.threads)
        timings = measure(turns, chosen.rounds)
    report(timings)
    if chosen.json:
        record = {"machine": asdict(describe_machine()), "weights": weights, "new_tokens": chosen.new}
        record["seconds_per_token"] = {name: timing.to_dict() for name, timing in timings.items()}
        chosen.json.write_text(json.dumps(record, indent=1))


def random_llama(layers: int) -> LlamaForCausalLM:
    """The shape of a Llama of a billion weights (with 16 layers)."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


@torch.inference_mode()
def quantized(model: PreTrainedModel, name: str, group: int) -> PreTrainedModel:
    """The model with all its linear layers rounded to nearest, the head included; it shares the rest."""
    form, shared = (format_called("e3m2"), "channel") if name == "fp6" else (format_called(name), group)
    memo = {id(parameter): parameter for parameter in model.parameters()}
    made = copy.deepcopy(model, memo)
    for path, layer in list(made.named_modules()):
        if type(layer) is nn.Linear:
            weight = layer.weight.float()
            grid = form.grid_for(Sample(weight[:64], shared))
            scales = choose_scales(weight, grid, shared, search=False, stored="bfloat16")
            qtensor = QTensor.of(apply_scales(weight, grid, scales), scales, grid)
            parent, _, leaf = path.rpartition(".")
            setattr(made.get_submodule(parent), leaf, QuantLinear.from_qtensor(qtensor, layer.bias, model.dtype))
    return made


def generating(model: PreTrainedModel, prompt: torch.Tensor, new: int) -> Turn:
    """What most people call. Its prompt is read in the first token's time, which is taken off."""

    def generate(tokens: int) -> tuple[float, float]:
        asked = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
        _, seconds = timed(lambda: model.generate(prompt, max_new_tokens=tokens, **asked))
        return seconds

    def turn() -> tuple[float, float]:
        first, all_ = generate(1), generate(new)
        return (all_[0] - first[0]) / (new - 1), (all_[1] - first[1]) / (new - 1)

    return turn


def decoders(name: str, model: PreTrainedModel, prompt: torch.Tensor, new: int) -> dict[str, Turn]:
    """The decoder of quantlab_evals, eager and compiled."""

    def turn_of(decoder: GreedyDecoder) -> Turn:
        def turn() -> tuple[float, float]:
            token = decoder.prefill(prompt)

            def decode() -> None:
                step = token
                for _ in range(new - 1):
                    step = decoder.step(step)
                step.item()

            _, (wall, cpu) = timed(decode)
            return wall / (new - 1), cpu / (new - 1)

        return turn

    found = {}
    for way in ("eager", "compiled"):
        decoder = GreedyDecoder(model, prompt.shape[1] + new, compiled=way == "compiled")
        try:
            decoder.step(decoder.prefill(prompt))
        except EvalError as error:
            print(f"{name} {way}: {error}")
            continue
        if decoder.build_seconds:
            print(f"{name} compiled in {decoder.build_seconds:.0f} s", flush=True)
        found[f"{name} {way}"] = turn_of(decoder)
    return found


def llama_cpp_turn(file: Path, prompt: list[int], new: int, threads: int) -> Turn:
    """llama.cpp on the same weights."""
    from llama_cpp import Llama

    settings = {"n_threads": threads, "n_threads_batch": threads, "n_ctx": len(prompt) + new, "verbose": False}
    model = Llama(str(file), **settings)

    def turn() -> tuple[float, float]:
        model.reset()
        model.eval(prompt)

        def decode() -> None:
            for _ in range(new - 1):
                model.eval([model.sample(temp=0.0)])

        _, (wall, cpu) = timed(decode)
        return wall / (new - 1), cpu / (new - 1)

    return turn


def write_gguf(model: LlamaForCausalLM, file: Path) -> Path:
    """The model as llama.cpp takes it, all matrices in Q4_0, with a vocabulary of numbered words."""
    config = model.config
    writer = GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    more = config.vocab_size - len(words)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words + [f"w{index}" for index in range(more)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types(kinds + [TokenType.NORMAL] * more)
    for name, tensor in model.state_dict().items():
        array, kind = tensor.float(), GGMLQuantizationType.F32
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp turns neighbouring rows, transformers those half a head apart.
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.view(heads, 2, -1, array.shape[-1]).transpose(1, 2).reshape(array.shape)
        if array.ndim == 2:
            kind = GGMLQuantizationType.Q4_0
        data = array.contiguous().numpy()
        writer.add_tensor(gguf_name(name), gguf_quantize(data, kind) if array.ndim == 2 else data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}


def gguf_name(name: str) -> str:
    for ours, theirs in _GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def measure(turns: dict[str, Turn], rounds: int) -> dict[str, Timing]:
    """One turn each that is not counted, then the rounds."""
    for turn in turns.values():
        turn()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            seconds[name].append(turn())
    return {name: Timing.of(took) for name, took in seconds.items()}


def report(timings: dict[str, Timing]) -> None:
    base = timings[BASE].wall
    print(f"{'':18}{'tok/s':>8}{'quartiles':>18}{'CPU ms':>9}{'x ' + BASE:>18}")
    for name, timing in timings.items():
        low, high = timing.quartiles
        ratio = statistics.median(theirs / ours for theirs, ours in zip(base, timing.wall, strict=True))
        spread = f"{1 / high:.1f} to {1 / low:.1f}"
        print(f"{name:18}{1 / timing.median:8.1f}{spread:>18}{1e3 * timing.cpu_median:9.2f}{ratio:18.2f}")


if __name__ == "__main__":
    main()
