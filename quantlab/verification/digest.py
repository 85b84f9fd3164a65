"""What a model says of a few prompts, short enough to keep beside it: its likeliest tokens at each position."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from quantlab.checkpoint.quantized import DIGEST
from quantlab.errors import CheckpointError
from quantlab.verification.streamed import SHAKE

# 1 had no version and no sensitivity.
_VERSION = 2
_LENGTH = 24  # tokens a prompt
_KEPT = 8  # tokens a position
_TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome. The capital of Germany is",
    "def add(a, b):\n    return a + b\n\ndef multiply(a, b):\n    return",
    "Once upon a time there was a little girl who lived with her mother near the edge of a large forest.",
    "In 1969 the first humans landed on the Moon; 12 people have walked there since, the last in",
)


@dataclass(frozen=True)
class Digest:
    """Predictions of a few prompts.

    Attributes:
        prompts: token ids, all of one length.
        tokens: for each prompt and position the likeliest next tokens, likeliest first.
        logprobs: their log-probabilities, in nats.
        sensitivity: how far they move, at most, when what comes into every module is rounded, as a multiple of how
            far it is rounded; None if that is not known.
    """

    prompts: list[list[int]]
    tokens: list[list[list[int]]]
    logprobs: list[list[list[float]]]
    sensitivity: float | None = None

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], logits: torch.Tensor, shaken: torch.Tensor | None = None) -> Digest:
        """The digest of what a model said of prompts.

        Args:
            prompts: token ids.
            logits: ``[prompts, length, vocabulary]``.
            shaken: ``[length, vocabulary]``, what it said of the first prompt when inputs were moved by ``SHAKE``.
        """
        best = logits.float().log_softmax(-1).topk(min(_KEPT, logits.shape[-1]))
        sensitivity = None
        if shaken is not None:
            moved = shaken.float().log_softmax(-1).gather(-1, best.indices[0]) - best.values[0]
            sensitivity = round(float(moved.abs().max()) / SHAKE, 3)
        logprobs = [[[round(value, 6) for value in row] for row in rows] for rows in best.values.tolist()]
        return cls([list(prompt) for prompt in prompts], best.indices.tolist(), logprobs, sensitivity)

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping that :meth:`from_dict` reads back."""
        return {"version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Digest:
        """Undo :meth:`to_dict`.

        Raises:
            CheckpointError: a newer version.
        """
        if (version := data.get("version", 1)) > _VERSION:
            raise CheckpointError(
                f"{DIGEST} has version {version}, this quantlab reads up to {_VERSION}; upgrade it, or remove the file"
            )
        return cls(data["prompts"], data["tokens"], data["logprobs"], data.get("sensitivity"))

    @classmethod
    def stored(cls, folder: Path) -> Digest | None:
        """The digest that is kept in a folder, or None.

        Raises:
            CheckpointError: a newer quantlab wrote it.
        """
        try:
            return cls.from_dict(json.loads((folder / DIGEST).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def gathered(self, logits: torch.Tensor) -> list[list[list[float]]]:
        """What logits ``[prompts, length, vocabulary]`` give the kept tokens: log-probabilities."""
        return logits.float().log_softmax(-1).gather(-1, torch.tensor(self.tokens)).tolist()

    def difference(self, logprobs: list[list[list[float]]]) -> float:
        """The largest difference to a log-probability that another model gave the same tokens, in nats.

        Unlike a divergence, which is its square, it tells a small change from a smaller one.
        """
        found, own = (torch.tensor(rows, dtype=torch.float64) for rows in (_flat(logprobs), _flat(self.logprobs)))
        return float((found - own).abs().max())

    def divergence(self, logprobs: list[list[list[float]]]) -> float:
        """Mean KL divergence, nats a position, from this digest to what another model gave the same tokens.

        Whatever is not among the kept tokens counts as one token: a lower bound that is close, as little is left there.

        Args:
            logprobs: like :attr:`logprobs`, of the same tokens, by the other model.
        """
        p, q = (torch.tensor(rows, dtype=torch.float64).exp() for rows in (_flat(self.logprobs), _flat(logprobs)))
        p = torch.cat([p, (1 - p.sum(1, keepdim=True)).clamp(min=1e-6)], dim=1)
        q = torch.cat([q, (1 - q.sum(1, keepdim=True)).clamp(min=1e-6)], dim=1)
        return float((p * (p / q).log()).sum(1).mean())


def prompts_for(folder: Path, vocabulary: int) -> list[list[int]]:
    """A few short prompts of one length: text by the folder's tokenizer, or fixed ids where it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        whole = [tokenizer(text)["input_ids"] for text in _TEXTS]
        prompts = [ids[: min(_LENGTH, *map(len, whole))] for ids in whole]
    except Exception:  # transformers raises many kinds
        prompts = []
    if not prompts or any(not prompt or max(prompt) >= vocabulary for prompt in prompts):
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, vocabulary, (len(_TEXTS), _LENGTH), generator=generator).tolist()
    return prompts


def _flat(rows: list[list[list[float]]]) -> list[list[float]]:
    return [row for prompt in rows for row in prompt]
