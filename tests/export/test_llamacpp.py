"""GGUF exports as llama.cpp runs them: every architecture, and what one of its models can have that others have not.

Skipped without `llama_cpp` (llama-cpp-python), which nothing else here needs. Layers are stored decoded, in float32, so
that llama.cpp rounds no activations: its logits are ours up to float32's own error, and where an MLP takes gelu up to
that of llama.cpp's table of gelu in float16.
"""

from __future__ import annotations

import pytest
import torch
from quantized_folders import SIZES, logits
from test_export_gguf import HEADS, MODELS, TIED, YARN, written
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
)

import quantlab
from quantlab.export import export

llama_cpp = pytest.importorskip("llama_cpp", reason="llama_cpp is not installed")

LONG = {**SIZES, "max_position_embeddings": 4096}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def longrope(original: int, pairs: int = 8, **more):
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.3 * i for i in range(pairs)],
        "long_factor": [2.0 + i for i in range(pairs)],
        "original_max_position_embeddings": original,
        **more,
    }


def partial(part: float):
    return {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": part}


GEMMA3 = {**HEADS, "num_hidden_layers": 6}
SPECIAL = {
    "llama-all-biased": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-theta": LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "llama-wide-heads": LlamaConfig(**SIZES, head_dim=32),
    "llama-linear": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "llama-llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama-yarn": LlamaConfig(**SIZES, rope_parameters=YARN),
    "llama-yarn-factor": LlamaConfig(**SIZES, rope_parameters={**YARN, "attention_factor": 1.0}),
    "llama-yarn-mscale": LlamaConfig(**SIZES, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
    "mistral-yarn": MistralConfig(**SIZES, head_dim=16, sliding_window=None, rope_parameters=YARN),
    "qwen2-tied": Qwen2Config(**TIED),
    "qwen2-yarn": Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen3-linear": Qwen3Config(**SIZES, head_dim=16, rope_parameters=LINEAR),
    "phi3-tied": Phi3Config(**TIED),
    "phi3-partial": Phi3Config(**SIZES, rope_parameters=partial(0.5)),
    "phi3-short": Phi3Config(**LONG, original_max_position_embeddings=1024, rope_parameters=longrope(1024)),
    "phi3-long": Phi3Config(**SIZES, original_max_position_embeddings=16, rope_parameters=longrope(16)),
    "phi3-partial-short": Phi3Config(
        **LONG, original_max_position_embeddings=1024, rope_parameters=longrope(1024, 4, partial_rotary_factor=0.5)
    ),
    "starcoder2-tied": Starcoder2Config(**TIED),
    "stablelm-biased": StableLmConfig(**SIZES, use_qkv_bias=True),
    "stablelm-parallel": StableLmConfig(**SIZES, use_parallel_residual=True, rope_parameters=partial(0.5)),
    "gemma2-window": Gemma2Config(**HEADS, sliding_window=8),
    "gemma3-window": Gemma3TextConfig(**GEMMA3, sliding_window=8),
    "gemma3-capped": Gemma3TextConfig(**GEMMA3, sliding_window=8, final_logit_softcapping=3.0),
    "gemma3-linear": Gemma3TextConfig(
        **GEMMA3,
        sliding_window=8,
        rope_parameters={
            "full_attention": {**LINEAR, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
}


def theirs(file):
    """llama.cpp's logits of the sequence that ours are of."""
    ids = (torch.arange(3, 43) * 7 % 300).tolist()
    llama = llama_cpp.Llama(
        str(file), n_ctx=64, n_batch=64, n_threads=1, type_k=0, type_v=0, logits_all=True, verbose=False
    )
    llama.reset()
    llama.eval(ids)
    found = torch.from_numpy(llama.scores[: len(ids)].copy())[None]
    llama.close()
    return found


@pytest.mark.parametrize("name", [*MODELS, *SPECIAL])
def test_it_says_what_our_model_says(name, tmp_path):
    config = {**MODELS, **SPECIAL}[name]
    folder = written(tmp_path, {"format": "int4"}, config)
    export(folder, "gguf", tmp_path / "model.gguf", settings={"types": {"*": "f32"}})
    ours = logits(quantlab.load(folder, dtype=torch.float32))
    by_table = name.startswith(("gemma", "starcoder"))
    assert (theirs(tmp_path / "model.gguf") - ours).abs().max() < (1e-2 if by_table else 2e-5) * ours.std()
