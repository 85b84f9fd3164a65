"""Reading a reference's predictions from disk (`recording.py` writes them), and divergence from a sample of them."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .errors import EvalError
from .reference import RecordLoss, ReferenceWindow, check_vocabularies, kl_divergence
from .windows import Windows

ABOUT = "record.json"


class RecordedReference:
    """A reference whose predictions on some windows are read from a folder that `recorded_reference` wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        self._account = _Account()

    @property
    def described(self) -> dict[str, Any]:
        """What `describe_model` said of the model when it ran."""
        return dict(self.about["model"])

    def over(self, windows: Windows, batch_size: int) -> Generator[ReferenceWindow, None, None]:  # noqa: ARG002
        """Yield its predictions window by window; raises `EvalError` if they are of other windows."""
        if windows.describe() != self.about["windows"]:
            raise EvalError(
                f"{self.folder}: the reference was recorded on other windows "
                f"(SHA-256 {self.about['windows']['sha256'][:12]}); record it on these"
            )
        self._account = _Account()
        for index in range(len(windows)):
            tensors = load_file(self.folder / window_file(index))
            yield _RecordedWindow(tensors, self.about["vocabulary"], self._account)

    def loss(self) -> RecordLoss | None:
        """What the record cost in the last pass; None if it holds whole distributions."""
        if self.about["top_k"] == self.about["vocabulary"]:
            return None
        account = self._account
        difference, exact = torch.cat(account.differences).double(), torch.cat(account.exact).double()
        return RecordLoss(
            top_k=self.about["top_k"],
            sampled=self.about["sampled"],
            tail_mass=account.tail / account.tokens,
            standard_error=account.variance**0.5 / account.tokens,
            difference=float(difference.mean()),
            difference_error=float(difference.std(correction=min(1, len(difference) - 1)) / len(difference) ** 0.5),
            exact_kl=float(exact.mean()),
            positions=len(difference),
        )


@dataclass
class _Account:
    """What a pass finds out of the cost of a record: sums over tokens, and values where all is known."""

    tokens: int = 0
    tail: float = 0.0
    variance: float = 0.0
    differences: list[Tensor] = field(default_factory=list)
    exact: list[Tensor] = field(default_factory=list)


class _RecordedWindow:
    def __init__(self, tensors: dict[str, Tensor], vocabulary: int, account: _Account) -> None:
        self.tensors = tensors
        self.vocabulary = vocabulary
        self.account = account

    def compare(self, part: slice, log_q: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG002
        check_vocabularies(log_q.shape[-1], self.vocabulary)
        here = {name: tensor[part].to(log_q.device) for name, tensor in self.tensors.items() if "whole" not in name}
        head = expected_log_ratio(here["indices"], here["log_p"], log_q)
        kl, variance = sampled_divergence(head, here["log_tail"], here["sample"], here["sample_log_p"], log_q)
        self.account.tokens += len(kl)
        self.account.tail += float(here["log_tail"].double().exp().sum())
        self.account.variance += float(variance.double().sum())
        self._check(part, kl, log_q)
        return kl, here["top"].long(), here["nll"]

    def _check(self, part: slice, kl: Tensor, log_q: Tensor) -> None:
        """Compare with the exact divergence where the whole distribution was kept."""
        at = self.tensors["whole_at"]
        inside = (at >= part.start) & (at < part.start + len(log_q))
        if inside.any():
            rows = (at[inside] - part.start).to(log_q.device)
            exact = kl_divergence(self.tensors["whole"][inside].to(log_q.device), log_q[rows])
            self.account.differences.append((kl[rows] - exact).cpu())
            self.account.exact.append(exact.cpu())


def expected_log_ratio(indices: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of `p (log p - log q)` over some tokens of each row: `[n, k]`, `[n, k]`, `[n, vocabulary]` to `[n]`."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q.gather(-1, indices.long())), 0).sum(-1)


def sampled_divergence(
    head: Tensor, log_tail: Tensor, sample: Tensor, sample_log_p: Tensor, log_q: Tensor
) -> tuple[Tensor, Tensor]:
    """KL(p || q) of each row in nats without bias, from a sample of the less likely tokens; and its variance.

    The tail's share of the divergence is its mass times the mean of `log p - log q` over tokens drawn from p's
    tail. A single row may come out below zero.

    Args:
        head: the other tokens' share, `[n]`.
        log_tail: logarithm of the tail's mass, `[n]`.
        sample: tokens drawn with replacement in proportion to p, `[n, m]`.
        sample_log_p: their log-probabilities, `[n, m]`.
        log_q: `[n, vocabulary]`.
    """
    mass = log_tail.exp()
    if sample.shape[-1] == 0:
        return head, torch.zeros_like(head)
    ratio = torch.where(mass[:, None] > 0, sample_log_p - log_q.gather(-1, sample.long()), 0)
    spread = ratio.var(-1, correction=min(1, sample.shape[-1] - 1)) / sample.shape[-1]
    return head + mass * ratio.mean(-1), mass.square() * spread


def window_file(index: int) -> str:
    """The name of the file that holds a window."""
    return f"{index:06}.safetensors"
