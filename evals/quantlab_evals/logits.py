"""Next-token logits of a causal language model, window by window, and the pieces to take them in."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import EvalError
from .windows import Windows, check_length

CHUNK_VALUES = 2**24
"""Logits that are turned into float32 in one piece (64 MiB): positions times vocabulary."""


def check_model(model: nn.Module, windows: Windows) -> None:
    """Raise `EvalError` if the model cannot predict these windows: kind, positions, vocabulary."""
    name = type(model).__name__
    config = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", None)
    if getattr(config, "is_encoder_decoder", False) or (can_generate is not None and not can_generate()):
        raise EvalError(
            f"{name} is not a causal language model, and perplexity and divergence are of the next token; "
            "load it with AutoModelForCausalLM, or measure a model that has one"
        )
    if config is None:
        return
    check_length(config, windows.length)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text_config, "vocab_size", None)
    largest = int(windows.tokens.max())
    if isinstance(vocabulary, int) and largest >= vocabulary:
        raise EvalError(
            f"the windows hold token {largest}, and the vocabulary of {name} has {vocabulary}; "
            "make the windows with this model's own tokenizer"
        )


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Hold models in evaluation mode (no dropout), and put them back afterwards."""
    training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, mode in zip(models, training, strict=True):
            model.train(mode)


def window_logits(model: nn.Module, windows: Windows, batch_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each window's next-token logits `[length - 1, vocabulary]` and next tokens `[length - 1]`.

    The logits are the model's own, in its dtype, from one plain forward pass: some models scale or cap
    them after the head, so applying the head outside of the model would be wrong for those. Peak memory is
    `batch_size * length * vocabulary` values of that dtype.
    """
    if batch_size < 1:
        raise EvalError(f"batch_size is {batch_size}; use 1 or more")
    device = _input_device(model)
    accepted = inspect.signature(model.forward).parameters
    any_keyword = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    options = {"use_cache": False} if any_keyword or "use_cache" in accepted else {}
    for tokens in windows.tokens.split(batch_size):
        tokens = tokens.to(device)
        with torch.no_grad():
            logits = getattr(model(input_ids=tokens, **options), "logits", None)
        if logits is None:
            raise EvalError(f"{type(model).__name__} returns no logits; load it with AutoModelForCausalLM")
        for row in range(len(tokens)):
            yield logits[row, :-1], tokens[row, 1:].to(logits.device)
        del logits  # or it would be held while the next batch makes its own


def position_chunks(logits: Tensor, positions: int | None = None) -> Iterator[slice]:
    """Yield slices of the rows of `logits`, of `positions` each (default: `CHUNK_VALUES` values)."""
    count, vocabulary = logits.shape
    if positions is None:
        positions = max(1, CHUNK_VALUES // vocabulary)
    if positions < 1:
        raise EvalError(f"chunk is {positions} positions; use 1 or more, or None for the default")
    for start in range(0, count, positions):
        yield slice(start, start + positions)


def refuse_nan(nll: Tensor, window: int, who: str) -> None:
    """Raise `EvalError` if a window's negative log-likelihoods `[positions]` are not all numbers."""
    broken = nll.isnan().nonzero()
    if len(broken):
        raise EvalError(
            f"window {window}: the logits of {who} are NaN or infinite at {len(broken)} of {len(nll)} "
            f"positions, the first at {int(broken[0])}, so it has no perplexity; if its dtype is float16, "
            "run it in bfloat16 or float32; otherwise its weights are broken: look at the layers' errors"
        )


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Return what of the model's state can move the figures: class, dtype, device, attention."""
    return {
        "model_class": type(model).__name__,
        "dtype": str(getattr(model, "dtype", None) or "unknown").removeprefix("torch."),
        "device": _input_device(model).type,
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None) or "unknown",
    }


def _input_device(model: nn.Module) -> torch.device:
    for tensor in model.parameters():
        # Offloaded weights are on "meta"; the hooks that bring them back move the inputs, too.
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")
