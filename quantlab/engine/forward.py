"""Forwards that stop: the model's own forward pass, suspended at the layers that are about to be quantized.

To quantize a layer one needs its inputs as they come out of everything that was quantized before it. The obvious
way runs the block again for each group of layers, or settles for inputs from the unquantized block. Here every batch is
one coroutine that runs *the model's own forward*; a hook on a layer suspends it there, holding the layer's input. When
all batches have arrived, the layer is solved, its weight replaced, and the batches go on from where they stood. So each
linear layer runs exactly once a batch, every layer sees inputs from quantized predecessors (GPTQ's "true sequential"),
and no code here knows what lies between two layers: masks, rotary embeddings, residuals, parallel attention, experts.

While suspended, a batch keeps what its own frames still need: the residual stream and the layer's input. Gradients are
switched off by whoever runs forwards, around all of them: the switch is the thread's, not the coroutine's.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from quantlab.engine.hooks import hooked
from quantlab.errors import PreflightError, QuantlabError


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a module's call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Forward(greenlet):
    """One batch on its way through the model.

    Attributes:
        at: the name of the module that it stands before, or None before the start and after the end.
        input: the first argument of that module's call.
        call: all its arguments.
        stops: names of modules before which it stands still.
        watched_by: entered while it runs.
    """

    def __init__(self, model: nn.Module, batch: torch.Tensor, stops: Container[str]) -> None:
        """Prepare, but do not start, a forward of ``batch`` (token ids int64 ``[sequences, length]``)."""
        super().__init__(self._forward)
        self.model = model
        self.batch = batch
        self.stops = stops
        self.at: str | None = None
        self.input: torch.Tensor | None = None
        self.call: Call | None = None
        self.log: list[tuple[str, torch.Tensor, int]] | None = None
        self.watched_by: AbstractContextManager[Any] = nullcontext()

    def _forward(self) -> None:
        self.model(**model_inputs(self.model, self.batch))

    def advance(self) -> None:
        """Run to the next stop, or to the end.

        Raises:
            PreflightError: the model's own code failed.
        """
        self.at, self.input, self.call = None, None, None
        self.parent = getcurrent()
        try:
            with self.watched_by:
                self.switch()
        except (QuantlabError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the model's code raises
            reason = " ".join(str(error).split())
            raise PreflightError(
                f"{type(self.model).__name__} cannot be run on calibration tokens alone ({type(error).__name__}: "
                f"{reason}); use a recipe that needs no calibration, for example w4-rtn with --set scale_search=mse"
            ) from error

    def cancel(self) -> None:
        """Give up the rest of the way and everything that it holds."""
        if self and not self.dead:
            self.parent = getcurrent()
            self.throw(GreenletExit)
        self.at, self.input, self.call = None, None, None

    def arrive(self, name: str, call: Call) -> None:
        """Called by a hook before the module ``name`` is called."""
        x = call.args[0] if call.args else next(iter(call.kwargs.values()))
        if self.log is not None:
            self.log.append((name, x, x._version))
        if name in self.stops:
            self.at, self.input, self.call = name, x, call
            assert self.parent is not None
            self.parent.switch()


@contextmanager
def watched(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Hooks on the modules called ``names``: a :class:`Forward` that reaches one of them may stop there."""

    def hook(name: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            current = getcurrent()
            if isinstance(current, Forward):
                current.arrive(name, Call(args, kwargs))

        return before

    # Before all other hooks: one that loads the module's weight is to do so when the batch goes on, not when it stops.
    with hooked(
        model.get_submodule(name).register_forward_pre_hook(hook(name), prepend=True, with_kwargs=True)
        for name in names
    ):
        yield


def shared_inputs(log: Iterable[tuple[str, torch.Tensor, int]]) -> list[list[str]]:
    """Group the layers of a log by the tensor that they were handed: q/k/v, gate/up, parallel attention and MLP.

    Two layers share an input if they saw the same memory in the same shape, not written to in between. The log keeps
    its tensors alive, so an address is not used twice.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    seen: set[str] = set()
    for name, x, version in log:
        if name not in seen:
            groups.setdefault((x.data_ptr(), version, x.numel(), x.shape[-1]), []).append(name)
            seen.add(name)
    return list(groups.values())


def model_inputs(model: nn.Module, batch: torch.Tensor) -> dict[str, Any]:
    """The arguments of the model's forward: a decoder that has an encoder sees the same text as the encoder."""
    parameters = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": batch}
    if "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = batch
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "use_cache" in parameters or (takes_any and hasattr(getattr(model, "config", None), "use_cache")):
        inputs["use_cache"] = False  # nobody will read the keys and values
    return inputs
