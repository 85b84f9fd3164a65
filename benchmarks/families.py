"""One trained Llama as checkpoints of other families, quantized, exported three ways, and read by each format's loader.

    python benchmarks/families.py MODEL TEXT WORK [--families llama mistral qwen2 phi3] [--recipe w4-gptq-fast]

Several families compute what a Llama computes, given the right tensors. MODEL's weights are rewritten as such a family:
real weights under other tensor names, in fused layers, through other code in transformers, GPTQModel and llama.cpp. The
rewritten model must say what MODEL says; then it is quantized, exported to compressed-tensors, GPTQ and GGUF, and each
file is loaded by its own loader in a fresh process (see `exported.py`), which is given the same token ids.

mistral      the same tensors, another class.
qwen2        the same tensors and biases of q, k and v, which a Llama has not: the rewritten model is held against MODEL
             with zeros there, then they are drawn at random, so that a reader that loses them is found out.
phi3         q, k, v and gate, up are one layer each.

The GPTQ loader needs optimum and gptqmodel, llama.cpp's needs llama-cpp-python; for figures that are comparable to
0.1 % the latter is built with OpenBLAS (docs/export.md).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from exported import compare, tokens_of
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

import quantlab
from quantlab.export import export

_Tensors = dict[str, torch.Tensor]
_Rewritten = tuple[PretrainedConfig, _Tensors]
# Random biases, as parts of what a layer's outputs spread: enough that each kind moves perplexity by percents.
_BIAS = {"q_proj": 0.3, "k_proj": 0.3, "v_proj": 0.03}


def _common(config: LlamaConfig) -> dict[str, Any]:
    """What all of these families say of themselves by the same words."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "rope_parameters",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    return {name: getattr(config, name) for name in names}


def as_llama(config: LlamaConfig, tensors: _Tensors) -> _Rewritten:
    return config, tensors


def as_mistral(config: LlamaConfig, tensors: _Tensors) -> _Rewritten:
    return MistralConfig(**_common(config), rms_norm_eps=config.rms_norm_eps, sliding_window=None), tensors


def as_qwen2(config: LlamaConfig, tensors: _Tensors) -> _Rewritten:
    biases = {
        name.replace(".weight", ".bias"): torch.zeros(len(weight), dtype=weight.dtype)
        for name, weight in tensors.items()
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    }
    return Qwen2Config(**_common(config), rms_norm_eps=config.rms_norm_eps), {**tensors, **biases}


def as_phi3(config: LlamaConfig, tensors: _Tensors) -> _Rewritten:
    merged = dict(tensors)
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}"
        for parts, whole in (("qkv", "self_attn.qkv_proj"), (("gate", "up"), "mlp.gate_up_proj")):
            room = whole.partition(".")[0]
            rows = [merged.pop(f"{block}.{room}.{part}_proj.weight") for part in parts]
            merged[f"{block}.{whole}.weight"] = torch.cat(rows)
    own = Phi3Config(
        **_common(config),
        rms_norm_eps=config.rms_norm_eps,
        original_max_position_embeddings=config.max_position_embeddings,
        sliding_window=None,
    )
    return own, merged


FAMILIES: dict[str, Callable[[LlamaConfig, _Tensors], _Rewritten]] = {
    "llama": as_llama,
    "mistral": as_mistral,
    "qwen2": as_qwen2,
    "phi3": as_phi3,
}


def rewrite(model: Path, family: str, out: Path) -> dict[str, float]:
    """Write MODEL as a checkpoint of the family, with its tokenizer; how far apart their logits are, and how large.

    Raises:
        SystemExit: MODEL is no Llama without biases, or the two say different things.
    """
    original = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    config = original.config
    if not isinstance(original, LlamaForCausalLM) or config.attention_bias or config.mlp_bias:
        raise SystemExit(f"{model}: is no Llama without biases")
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    tensors = {name: tensor for name, tensor in original.state_dict().items() if name not in tied}
    own, renamed = FAMILIES[family](config, tensors)
    rewritten = AutoModelForCausalLM.from_config(own, dtype=original.dtype).eval()
    rewritten.load_state_dict({**renamed, **({"lm_head.weight": renamed["model.embed_tokens.weight"]} if tied else {})})
    rewritten.tie_weights()
    found = _apart(original, rewritten)
    if found["apart"] > 1e-3 * found["spread"]:
        raise SystemExit(f"{family}: is not what {model} is: {found}")
    _draw_biases(rewritten)
    rewritten.generation_config = original.generation_config
    rewritten.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return found


@torch.no_grad()
def _apart(original: PreTrainedModel, rewritten: PreTrainedModel) -> dict[str, float]:
    """The largest difference of logits, in float32, and their standard deviation."""
    ids = torch.randint(0, original.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    dtype = original.dtype
    ours, theirs = original.float()(ids).logits, rewritten.float()(ids).logits
    rewritten.to(dtype)
    return {"apart": float((ours - theirs).abs().max()), "spread": float(ours.std())}


@torch.no_grad()
def _draw_biases(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        block, _, leaf = name.rpartition(".self_attn.")
        if leaf in _BIAS and module.bias is not None:
            norm = model.get_submodule(f"{block}.input_layernorm").weight  # its outputs have a mean square of 1
            spread = (module.weight * norm).float().norm(dim=1)
            module.bias.copy_(_BIAS[leaf] * spread * torch.randn(len(spread), generator=generator))


def _exports(folder: Path, work: Path, verified: bool) -> list[tuple[str, str]]:
    """All exports of a folder, and who loads them."""
    places = {"compressed-tensors": work / "ct", "gptq": work / "gptq", "gguf": work / "model.gguf"}
    for to, place in places.items():
        if not place.exists():
            done = export(folder, to, place)
            print(f"  {to}: {'codes as they are' if done.exact else 'not exact'}", *done.notes, sep="; ")
        if verified:
            report = quantlab.verify(place, folder)
            print(f"  verify {to}: {'passed' if report.passed else report.failure}", *_details(report), sep="; ")
    ct, gptq, gguf = map(str, places.values())
    return [("transformers", ct), ("transformers-gptq", gptq), ("transformers-gguf", gguf), ("llama.cpp", gguf)]


def _details(report: Any) -> list[str]:
    return [check.detail for check in report.checks if "predictions" in check.name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a Llama")
    parser.add_argument("text")
    parser.add_argument("work", type=Path, help="a folder for all that is made; what is there already is used again")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--recipe", default="w4-gptq-fast")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=24, help="greedy tokens after each prompt")
    parser.add_argument("--verify", action="store_true")
    options = parser.parse_args()
    for family in options.families:
        started, work = time.process_time(), options.work / f"{family}-{Path(options.recipe).stem}"
        original, folder = options.work / family, work / "quantized"
        if not original.exists():
            print(f"{family}: logits against MODEL's:", rewrite(options.model, family, original), flush=True)
        if not folder.exists():
            result = quantlab.quantize(original, options.recipe, folder)
            print(f"{family}, {options.recipe}: {result.bits:.3f} bits a weight", flush=True)
        exported = _exports(folder, work, options.verify)
        windows, prompts = tokens_of(str(folder), options.text, options.windows, options.length)
        ours = None
        for line in compare(str(folder), exported, windows, prompts, options.tokens):
            ours = ours or line
            print(f"  {line.beside(ours)}", flush=True)
        print(f"  {time.process_time() - started:.0f} CPU seconds besides the loaders", flush=True)


if __name__ == "__main__":
    main()
