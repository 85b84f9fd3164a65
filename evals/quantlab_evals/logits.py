"""One pass of a causal language model over windows of tokens, and what is measured of every token on the way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import EvalError
from .machine import device_name
from .windows import Windows, check_length

CHUNK_VALUES = 2**24
"""Logits that are turned into float32 in one piece (64 MiB): positions times vocabulary."""

Progress = Callable[[int, int], None]
"""Called with the windows done and the windows in all."""


class TokenMeasure(Protocol):
    """Something that is measured of every predicted token while a model runs over the windows once."""

    def add(self, window: int, part: slice, log_q: Tensor, targets: Tensor) -> None:
        """Take the positions `part` of a window: log-probabilities `[n, vocabulary]` float32, next tokens `[n]`."""

    def end_window(self, window: int) -> None:
        """All positions of a window have been added."""


def run_measures(
    model: nn.Module,
    windows: Windows,
    measures: Sequence[TokenMeasure],
    *,
    batch_size: int = 1,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Run a model over windows once and hand every predicted token to each of the measures.

    `chunk` is the number of positions whose log-probabilities are in float32 at the same time; it changes
    memory, not the results. Raises `EvalError` as `check_model` does.
    """
    check_model(model, windows)
    with evaluating(model):
        for index, (logits, targets) in enumerate(window_logits(model, windows, batch_size)):
            for part in position_chunks(logits, chunk):
                log_q = logits[part].float().log_softmax(-1)
                for measure in measures:
                    measure.add(index, part, log_q, targets[part])
            del logits, log_q
            for measure in measures:
                measure.end_window(index)
            if progress is not None:
                progress(index + 1, len(windows))


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
    """Yield each window's next-token logits `[predicted, vocabulary]` and the tokens to predict `[predicted]`.

    The logits are the model's own, in its dtype, from one plain forward pass: some models scale or cap
    them after the head, so applying the head outside of the model would be wrong for those. Peak memory is
    `batch_size * length * vocabulary` values of that dtype.
    """
    if batch_size < 1:
        raise EvalError(f"batch_size is {batch_size}; use 1 or more")
    device = input_device(model)
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
            context = windows.context
            yield logits[row, context - 1 : -1], tokens[row, context:].to(logits.device)
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
        "device": running_on(model),
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None) or "unknown",
    }


def running_on(model: nn.Module) -> str:
    """The kinds of devices that a model is on, GPUs by what they are: ``cpu``, ``cuda (NVIDIA H100), cpu, disk``."""
    places = getattr(model, "hf_device_map", None) or {"": input_device(model)}
    return ", ".join(dict.fromkeys(device_name(place) for place in places.values()))


def is_spread(model: nn.Module) -> bool:
    """Whether accelerate put parts of a model into different places: some come when they are called."""
    return len({*(getattr(model, "hf_device_map", None) or {}).values()}) > 1


def input_device(model: nn.Module) -> torch.device:
    """The device that a model takes its tokens on."""
    for tensor in model.parameters():
        # Offloaded weights are on "meta"; the hooks that bring them back move the inputs, too.
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")
