"""Tiny models, saved and quantized once."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, tiny_model
from engine_recipes import W4_GPTQ

import quantlab


@dataclass(frozen=True)
class Quantized:
    """A model's folder, its quantized folder, and what quantlab said of it."""

    original: Path
    folder: Path
    result: quantlab.Result


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Calibration data: 8 sequences of 32 tokens."""
    return torch.randint(3, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """The folder of a tiny model, by name."""

    @functools.cache
    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "model"
        tiny_model(name).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def quantized(original, tokens, tmp_path_factory):
    """A tiny model quantized by w4-gptq, by name."""

    @functools.cache
    def run(name: str) -> Quantized:
        folder = tmp_path_factory.mktemp(name) / "quantized"
        return Quantized(original(name), folder, quantlab.quantize(original(name), W4_GPTQ, folder, calibration=tokens))

    return run


@pytest.fixture
def run(tokens, tmp_path):
    """Quantize a model by W4_GPTQ with changes, into a fresh folder."""

    def quantize(model: Any, changes: dict[str, Any] | None = None, out: str = "out", **kwargs: Any):
        kwargs.setdefault("calibration", tokens)
        return quantlab.quantize(model, {**W4_GPTQ, **(changes or {})}, tmp_path / out, **kwargs)

    return quantize
