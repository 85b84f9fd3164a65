"""KL divergence of a changed model, with the forward pass resumed at the first changed block.

What the blocks return is kept from one pass of the original. To measure a change the model's own forward runs again,
and blocks before the change answer with what they returned: no code here knows what lies between blocks. Weights are
changed in place and put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quantlab.engine.architecture import OUTSIDE, Architecture, get_weight
from quantlab.engine.forward import Forward, shared_inputs, watched
from quantlab.engine.hooks import hooked

# Positions whose probabilities are held in float32 at once.
_CHUNK = 256


class ResumedDivergence:
    """Mean token KL of changes to a model's weights, on a few sequences.

    Args:
        model: in memory, float32 or at least precise enough for the changes that are to be told apart: in bfloat16 a
            change that rounds other activations differently costs about 0.001 nats, whatever it is.
        architecture: its parts.
        tokens: int64 ``[sequences, length]``.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture, tokens: torch.Tensor) -> None:
        self.model = model
        self.tokens = tokens
        self._architecture = architecture
        self._returned: dict[str, Any] = {}
        self._order: list[str] = []
        with torch.no_grad(), self._recorded():
            self._reference = self._logits()
        if len(self._order) > 1 and float((self._logits(before=self._order[-1]) - self._reference).abs().max()) != 0:
            # A block whose call does more than return something, or writes into what another returned.
            self._order = []
        if not self._order:
            self._returned.clear()

    @property
    def resumes(self) -> bool:
        """Whether forwards are resumed; else they run from the start, which gives the same and takes twice as long."""
        return bool(self._order)

    @torch.no_grad()
    def of(self, changes: Mapping[str, torch.Tensor]) -> float:
        """Nats a token, if layers have other weights ``[out, in]``."""
        with self._changed(changes):
            logits = self._logits(before=self._first(changes))
        return self._divergence(logits)

    @torch.no_grad()
    def loss_of(self, changes: Mapping[str, torch.Tensor]) -> float:
        """Negative log-likelihood of the text itself, nats a token, if layers have other weights."""
        with self._changed(changes):
            logits = self._logits(before=self._first(changes))
        labels = self.tokens[:, 1:].flatten()
        total = 0.0
        for rows, part in zip(logits.split(_CHUNK), labels.split(_CHUNK), strict=True):
            total += float(nn.functional.cross_entropy(rows.float(), part, reduction="sum"))
        return total / len(labels)

    def weight(self, layer: str) -> torch.Tensor:
        """A layer's original weight, ``[out, in]``."""
        return get_weight(self.model.get_submodule(layer))

    def _logits(self, before: str | None = None) -> torch.Tensor:
        """Of all positions that predict a token, ``[positions, vocabulary]``; blocks before ``before`` are not run."""
        skipped = self._order[: self._order.index(before)] if before in self._order else []
        with torch.no_grad(), self._answering(skipped):
            return self.model(input_ids=self.tokens, use_cache=False).logits[:, :-1].flatten(0, 1)

    def _first(self, changes: Mapping[str, torch.Tensor]) -> str | None:
        """The first block that changes touch; None: everything has to run (an embedding), or nothing resumes."""
        places = {self._architecture.place_of(name) for name in changes}
        if any(name in self._architecture.embeddings for name in changes) or not self._order:
            return None
        places.discard(OUTSIDE)  # a head: what is behind the blocks runs in any case
        return min(places, key=self._order.index, default=self._order[-1])

    def _divergence(self, logits: torch.Tensor) -> float:
        """Mean of ``KL(reference || model)`` over positions."""
        total = 0.0
        for p, q in zip(self._reference.split(_CHUNK), logits.split(_CHUNK), strict=True):
            log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
            total += float(nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True).double())
        return total / len(logits)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keep what blocks return; where one is called twice, no forward is resumed."""

        def keep(name: str) -> Any:
            def after(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
                if name in self._returned:
                    twice.append(name)
                self._returned[name] = output
                self._order.append(name)

            return after

        twice: list[str] = []
        modules = {name: self.model.get_submodule(name) for name in self._architecture.blocks}
        with hooked(module.register_forward_hook(keep(name), with_kwargs=True) for name, module in modules.items()):
            try:
                yield
            finally:
                if twice:
                    self._order = []

    @contextmanager
    def _answering(self, names: list[str]) -> Iterator[None]:
        """Let blocks answer with what they returned."""
        modules = [self.model.get_submodule(name) for name in names]
        for name, module in zip(names, modules, strict=True):
            vars(module)["forward"] = _Answer(self._returned[name])
        try:
            yield
        finally:
            for module in modules:
                vars(module).pop("forward", None)

    @contextmanager
    def _changed(self, changes: Mapping[str, torch.Tensor]) -> Iterator[None]:
        kept = {name: self.weight(name).clone() for name in changes}
        try:
            for name, weight in changes.items():
                self.weight(name).copy_(weight)
            yield
        finally:
            for name, weight in kept.items():
                self.weight(name).copy_(weight)


def shared_groups(
    model: PreTrainedModel, architecture: Architecture, names: Sequence[str], tokens: torch.Tensor
) -> list[tuple[str, ...]]:
    """Layers of a model in memory that share an input, in the order in which it runs; at the end those that do not run.

    Args:
        model: with all its weights.
        architecture: its parts.
        names: the layers that are asked for.
        tokens: a few, ``[sequences, length]``.
    """
    forward = Forward(model, tokens, ())
    forward.log = []
    with torch.no_grad(), watched(model, [name for name in names if name not in architecture.embeddings]):
        forward.advance()
        groups = [tuple(group) for group in shared_inputs(forward.log)]
    seen = {name for group in groups for name in group}
    # Experts see tokens of their own, even where a few tokens cannot show it.
    apart = [(name,) for group in groups for name in group if name in architecture.routed]
    shared = [kept for group in groups if (kept := tuple(name for name in group if name not in architecture.routed))]
    return [*shared, *apart, *((name,) for name in names if name not in seen)]


class _Answer:
    """A forward that returns what was returned before."""

    def __init__(self, returned: Any) -> None:
        self._returned = returned

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._returned
