"""A run holds a block, what it knows of one layer's inputs, and the batches' states: never the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

_MB = 1 << 20
# Quantizes each folder in turn and says how much memory this process has held at most after each: the first is small,
# and takes in what the libraries need.
_PROGRAM = """
import json, resource, sys
import torch
from quantlab import quantize

torch.set_num_threads(1)
peaks = []
for number, folder in enumerate(sys.argv[3:]):
    tokens = torch.randint(3, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    quantize(folder, json.loads(sys.argv[1]), f"{sys.argv[2]}/{number}", calibration=tokens)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A model of one block, and one of 32 blocks with 6 MB each."""
    made = []
    for name, width, blocks in (("small", 64, 1), ("large", 512, 32)):
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width + width // 2,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=64,
            dtype="bfloat16",
        )
        folder = tmp_path_factory.mktemp(name) / "model"
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(folder, max_shard_size="40MB")
        made.append(folder)
    return made


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory as Linux counts it")
@pytest.mark.parametrize(
    ("recipe", "bound"),
    [({"scale_search": "absmax", "quantizer": "rtn"}, 40), ({"scale_search": "absmax", "quantizer": "gptq"}, 72)],
    ids=["rtn", "gptq"],
)
def test_memory_does_not_grow_with_the_model(recipe, bound, folders, tmp_path):
    size = sum(file.stat().st_size for file in folders[1].glob("*.safetensors"))
    assert size > 2 * bound * _MB  # the bound is not kept by a run that holds the model
    command = [sys.executable, "-c", _PROGRAM, json.dumps({"format": "int4", "granularity": 32, **recipe}), tmp_path]
    done = subprocess.run([*command, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    small, large = json.loads(done.stdout.splitlines()[-1])
    assert large - small < bound * _MB, f"{(large - small) / _MB:.0f} MB"
