"""What a model writes: sampling with fixed seeds, and what can be said of the text without reading it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from .errors import EvalError
from .logits import evaluating, input_device
from .perplexity import exp, token_nll

Tokens = Sequence[int]

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 takes the likeliest; `top_k` 0 and `top_p` 1 leave all to choose from."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise EvalError(f"temperature {self.temperature}: use 0 (the likeliest token) or more")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise EvalError(
                f"top_k {self.top_k}, top_p {self.top_p}, max_new_tokens {self.max_new_tokens}: use 0 (all) or more, "
                "above 0 to 1 (all), and 1 or more"
            )


def sampling_grid(
    temperatures: Sequence[float], top_ks: Sequence[int], top_ps: Sequence[float], max_new_tokens: Sequence[int]
) -> list[Sampling]:
    """Every combination; at temperature 0, where there is nothing to choose, one for each length."""
    cells = [
        Sampling(temperature, *(rest[:2] if temperature else (0, 1.0)), rest[2])
        for temperature in temperatures
        for rest in itertools.product(top_ks, top_ps, max_new_tokens)
    ]
    return list(dict.fromkeys(cells))


def generate(
    model: nn.Module, prompt: Tokens, sampling: Sampling, *, samples: int = 1, seed: int = 0
) -> list[list[int]]:
    """Continue a prompt: the new tokens of each sample, up to the end-of-text token and without it.

    Equal seeds give equal text on one machine; the state of torch's random numbers is left as it was. What the
    model's own `generation_config` says of sampling and penalties is not used, of its special tokens it is.
    An encoder-decoder model reads the prompt and writes an answer. Raises `EvalError` if the model cannot generate.
    """
    if not hasattr(model, "generate") or not prompt:
        what = "an empty prompt" if not prompt else f"{type(model).__name__}, which has no generate()"
        raise EvalError(f"{what}: give a language model of transformers and a prompt of one token or more")
    device = input_device(model)
    tokens = torch.tensor([list(prompt)], device=device)
    own_randomness = torch.random.fork_rng([device.index or 0] if device.type == "cuda" else [])
    language_model: Any = model
    with evaluating(model), _only(language_model, sampling, samples) as ends, torch.no_grad(), own_randomness:
        torch.manual_seed(seed)
        written = language_model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        written = written[:, 1:]
    else:
        written = written[:, len(prompt) :]
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in written.tolist()]


@contextmanager
def _only(model: Any, sampling: Sampling, samples: int) -> Iterator[set[int]]:
    """Let nothing but `sampling` decide, and yield the tokens that end a text.

    `generate` fills up what a configuration leaves open from the model's own, so that is put aside.
    """
    own = model.generation_config
    kept = {name: getattr(own, name, None) for name in _TOKEN_IDS}
    ends = kept["eos_token_id"]
    end_set = set() if ends is None else set(ends) if isinstance(ends, list) else {ends}
    if kept["pad_token_id"] is None:
        kept["pad_token_id"] = min(end_set, default=0)
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
    length = sampling.max_new_tokens
    try:
        model.generation_config = GenerationConfig(**kept, **chosen, max_new_tokens=length)
        if samples > 1:
            if not sampling.temperature:
                raise EvalError(f"{samples} samples at temperature 0 are all the same; use 1, or a temperature")
            model.generation_config.num_return_sequences = samples
        yield end_set
    finally:
        model.generation_config = own


@dataclass(frozen=True)
class Scored:
    """Continuations under a model: perplexity of their tokens, and the share that the model ranks first."""

    perplexity: float
    agreement: float
    tokens: int


def score(model: nn.Module, prompts: Sequence[Tokens], continuations: Sequence[Tokens]) -> Scored:
    """Score continuations of prompts under a causal language model, whoever wrote them.

    Raises `EvalError` if there is not a single token to score.
    """
    nll, agrees, count = 0.0, 0, 0
    device = input_device(model)
    with evaluating(model), torch.no_grad():
        for prompt, continuation in zip(prompts, continuations, strict=True):
            if not continuation:
                continue
            tokens = torch.tensor([[*prompt, *continuation]], device=device)
            logits = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1]
            targets = tokens[0, len(prompt) :].to(logits.device)
            nll += float(token_nll(logits.float().log_softmax(-1), targets).double().sum())
            agrees += int((logits.argmax(-1) == targets).sum())
            count += len(continuation)
    if not count:
        raise EvalError("there is no token to score: every continuation is empty")
    return Scored(exp(nll / count), agrees / count, count)


def distinct(continuations: Sequence[Tokens], n: int) -> float:
    """distinct-n: different n-grams over all n-grams of all continuations (arXiv:1510.03055); 0 if there are none."""
    grams = [gram for tokens in continuations for gram in _grams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(continuations: Sequence[Tokens], n: int = 4) -> float:
    """seq-rep-n: share of a continuation's n-grams that it holds before, mean over continuations (arXiv:1908.04319)."""
    shares = [1 - len(set(grams)) / len(grams) for tokens in continuations if (grams := list(_grams(tokens, n)))]
    return sum(shares) / len(shares) if shares else 0.0


def _grams(tokens: Tokens, n: int) -> Iterator[tuple[int, ...]]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)
