"""A tiny model in a folder, a text, and a sweep of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from llama_of_words import VOCABULARY, llama_of_words, write_words

from quantlab.sweep import Setup, sweep

SPACE = {
    "recipe": "w4-rtn",
    "calibration": {"samples": 4, "length": 32, "source": "text"},
    "grids": [{"formats": ["int"], "bits": [3, 4], "quantizers": ["rtn", "gptq"], "groups": [32]}],
    "baselines": ["bitsandbytes:nf4"],
}


@pytest.fixture(scope="session")
def place(tmp_path_factory, save_tokenizer) -> Path:
    """A folder with `model` and `text.txt`."""
    root = tmp_path_factory.mktemp("sweep")
    llama_of_words().save_pretrained(root / "model")
    save_tokenizer(root / "model", VOCABULARY)
    write_words(root / "text.txt")
    return root


@pytest.fixture(scope="session")
def space(place):
    return {**SPACE, "calibration": {**SPACE["calibration"], "source": str(place / "text.txt")}}


@pytest.fixture(scope="session")
def setup(place):
    settings = {"length": 64, "windows": 8, "measures": ("perplexity", "divergence", "calibration")}
    return Setup(text=str(place / "text.txt"), settings=settings, devices=("rtx4090",))


@pytest.fixture(scope="session")
def swept(place, space, setup):
    """A finished sweep, not to be changed."""
    return sweep(place / "model", space, place / "swept", setup=setup)
