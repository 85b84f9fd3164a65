"""Milliseconds a token of a Llama of eight billion random weights on a GPU: bfloat16, and quantized.

    python benchmarks/gpu_decode.py [--format int4 e3m2] [--group 128] [--batch 1 16] [--prompt 2048]

A step is timed as Python launches it and as a CUDA graph, which is how servers decode. The head stays in bfloat16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from quantlab.nn import QuantLinear
from quantlab.numerics import QTensor, grid

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
CONFIG = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
LENGTH = 256  # of the cache
POSITION = 16


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--format", nargs="*", default=["int4"])
    options.add_argument("--group", type=int, default=128)
    options.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    options.add_argument("--prompt", type=int, default=2048)
    chosen = options.parse_args()
    for name in ("bf16", *chosen.format):
        model = llama()
        if name != "bf16":
            quantize(model, name, chosen.group)
        torch.cuda.reset_peak_memory_stats()
        for batch in chosen.batch:
            launched, graph = decode(model, batch)
            print(f"{name}, batch {batch}: {launched:.2f} ms launched, {graph:.2f} ms as a graph, "
                  f"{batch / graph * 1e3:.0f} tokens/s")  # fmt: skip
        taken = prefill(model, chosen.prompt)
        print(f"{name}, prompt of {chosen.prompt}: {taken:.1f} ms; {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
        del model
        torch.cuda.empty_cache()


def llama() -> LlamaForCausalLM:
    """The model with random weights, made where it will run."""
    torch.set_default_dtype(DTYPE)
    with DEVICE:
        model = LlamaForCausalLM(CONFIG)
    torch.set_default_dtype(torch.float32)
    return model.eval().to(DTYPE)


def quantize(model: nn.Module, format: str, group: int) -> None:
    """Put random codes in the place of all linear layers but the head."""
    values = grid(format)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            outputs, inputs = module.weight.shape
            codes = torch.randint(0, len(values), (outputs, inputs), device=DEVICE, dtype=torch.uint8)
            step = 0.02 / float(values.values.abs().max())
            scales = torch.full((outputs, inputs // group), step, device=DEVICE, dtype=DTYPE)
            layer = QuantLinear.from_qtensor(QTensor(codes=codes, scales=scales, zeros=None, grid=values))
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.to(DEVICE))


@torch.no_grad()
def decode(model: LlamaForCausalLM, batch: int) -> tuple[float, float]:
    """Milliseconds of a step, launched from Python and replayed as a graph."""
    cache = StaticCache(config=CONFIG, max_cache_len=LENGTH)
    ids = torch.zeros(batch, 1, dtype=torch.long, device=DEVICE)
    position = torch.full((1,), POSITION, device=DEVICE)
    mask = torch.zeros(batch, 1, 1, LENGTH, dtype=DTYPE, device=DEVICE)

    def step() -> object:
        return model(
            input_ids=ids, attention_mask=mask, position_ids=position[None].expand(batch, 1), past_key_values=cache,
            cache_position=position, use_cache=True,
        ).logits  # fmt: skip

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    launched = milliseconds(step, 10)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return launched, milliseconds(graph.replay, 50)


@torch.no_grad()
def prefill(model: LlamaForCausalLM, tokens: int) -> float:
    """Milliseconds of a prompt."""
    ids = torch.randint(0, CONFIG.vocab_size, (1, tokens), device=DEVICE)
    return milliseconds(lambda: model(ids, logits_to_keep=1), 3)


def milliseconds(call: Callable[[], object], times: int) -> float:
    """The mean of so many calls, after one that is not counted."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times * 1e3


if __name__ == "__main__":
    main()
