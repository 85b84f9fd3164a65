"""Greedy decoding with as little Python between two tokens as there can be.

``model.generate`` is made for every way to decode, and spends milliseconds a token on that. Here a step is one call: a
token in, the next one out, on a cache of fixed length, the head on the last position only. Compiled it is one graph:
without the checks (guards) that torch.compile would make before each call, because nothing that they look at can change
between two steps, bound to the model's weights, so that Python does not collect hundreds of them for each token, and
with a wrapper in C++, so that no operator is called from Python.

A module whose class has a function ``compile_options(cpp_wrapper) -> dict`` has its say in how torch compiles the step.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from .attention import ONE_QUERY
from .errors import EvalError
from .logits import input_device, is_spread, running_on

Step = Callable[[Tensor], Tensor]


class GreedyDecoder:
    """The most likely continuation of prompts of equal length, as ``model.generate(do_sample=False)`` gives it.

    Up to rounding, that is: compiled code rounds less often than eager code does, so in 16-bit types two tokens that
    are almost equally likely may change places.

    A step reads the whole cache, used or not: do not make it longer than it has to be.

    Attributes:
        model: which must not be changed once a step was compiled.
        batch: prompts in a batch.
        max_length: tokens of prompt and continuation together.
        build_seconds: what compiling took; 0.0 before the first step, and for a decoder that does not compile.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_length: int,
        *,
        batch: int = 1,
        compiled: bool = True,
        cpp_wrapper: bool = True,
    ) -> None:
        """Allocate nothing yet; the first prompt does.

        Args:
            model: any causal language model of transformers that takes a static cache.
            max_length: see above.
            batch: see above.
            compiled: whether steps are compiled; the first one takes as long as the compiler does.
            cpp_wrapper: compile the calls between operators, too. Takes longer to build and less time to run.

        Raises:
            EvalError: there is nothing to decode, or the model has no static cache.
        """
        for name, value, least in (("max_length", max_length, 2), ("batch", batch, 1)):
            if type(value) is not int or value < least:
                raise EvalError(f"{name} {value!r}: use a whole number, at least {least}")
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(positions, int) and max_length > positions:
            raise EvalError(f"max_length {max_length}: the model has {positions} positions; use fewer tokens")
        if not getattr(model, "_can_compile_fullgraph", False):
            raise EvalError(
                f"{type(model).__name__} cannot decode on a cache of fixed length, says transformers: it has layers "
                "whose cache grows, or control flow that depends on its data"
            )
        self.model, self.batch, self.max_length, self.build_seconds = model, batch, max_length, 0.0
        self._cache = StaticCache(config=model.config, max_cache_len=max_length)
        accepted = inspect.signature(model.forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._cpp_wrapper = cpp_wrapper and input_device(model).type == "cpu"
        self._compiled = compiled
        self._run: Step | None = None
        self._used = 0

    @torch.inference_mode()
    def prefill(self, prompt: Tensor) -> Tensor:
        """Forget what was decoded, and read ``prompt [batch, tokens]``. Returns the next tokens ``[batch, 1]``.

        Raises:
            EvalError: a prompt of another batch size, or one that leaves no room for a token.
        """
        if prompt.ndim != 2 or prompt.shape[0] != self.batch or not 0 < prompt.shape[1] < self.max_length:
            raise EvalError(
                f"prompt of shape {list(prompt.shape)}: this decoder takes [{self.batch}, 1 to {self.max_length - 1}]"
            )
        self._cache.reset()
        self._used = prompt.shape[1]
        return self._next(prompt.to(input_device(self.model)))

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """The tokens ``[batch, 1]`` that follow ``tokens [batch, 1]``; :meth:`prefill` comes first.

        Raises:
            EvalError: the cache is full or there was no prompt; the step cannot be compiled here.
        """
        if not 0 < self._used < self.max_length:
            what = "is full" if self._used else "is empty: prefill first"
            raise EvalError(f"the cache of {self.max_length} tokens {what}")
        self._used += 1
        if self._run is None:
            return self._first(tokens)
        return self._run(tokens)

    def tokens(self, prompt: Tensor) -> Iterator[Tensor]:
        """Token after token ``[batch, 1]``, until the cache is full or nobody asks for more."""
        token = self.prefill(prompt)
        yield token
        while self._used < self.max_length:
            token = self.step(token)
            yield token

    def generate(self, prompt: Tensor, new_tokens: int) -> Tensor:
        """``prompt [batch, tokens]`` continued by ``new_tokens``: ``[batch, tokens + new_tokens]``; no token ends it.

        Raises:
            EvalError: the cache is too short for that.
        """
        if not 0 < new_tokens <= self.max_length - prompt.shape[-1] + 1:
            raise EvalError(
                f"new_tokens {new_tokens}: after a prompt of {prompt.shape[-1]} tokens a cache of {self.max_length} "
                f"has room for 1 to {self.max_length - prompt.shape[-1] + 1}"
            )
        continued = islice(self.tokens(prompt), new_tokens)  # which takes no step more
        return torch.cat([prompt, *(token.to(prompt.device) for token in continued)], dim=1)

    def _next(self, tokens: Tensor) -> Tensor:
        """One forward pass on the cache, and the most likely token after the last."""
        logits = self.model(input_ids=tokens, past_key_values=self._cache, use_cache=True, **self._last).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def _own_function(self) -> Step:
        """A step whose compiled code no other decoder finds.

        torch keeps compiled code by code object, and tells instances apart by the guards that are skipped here.
        """

        def step(tokens: Tensor) -> Tensor:
            return self._next(tokens)

        return FunctionType(step.__code__.replace(), step.__globals__, step.__name__, None, step.__closure__)

    def _is_static(self) -> bool:
        """Whether tensors alone change between two steps: sliding windows count their tokens in Python."""
        return all(type(layer) is StaticLayer for layer in self._cache.layers)

    def _compile_options(self) -> dict[str, Any]:
        """What torch's compiler is told."""
        options: dict[str, Any] = {
            "cpp_wrapper": self._cpp_wrapper,
            # Apart, the wrapper of hundreds of calls is not optimized as a kernel is: a tenth of the time to build.
            "cpp_wrapper_build_separate": self._cpp_wrapper,
            "cpp.min_chunk_size": _WORTH_A_THREAD,
            "size_asserts": False,
        }
        for kind in {type(module) for module in self.model.modules()}:
            own = getattr(kind, "compile_options", None)
            options |= {} if own is None else own(self._cpp_wrapper)
        return options

    def _first(self, tokens: Tensor) -> Tensor:
        """The first step ever: it is compiled while it runs."""
        if not self._compiled:
            self._run = self._next
            return self._run(tokens)
        if is_spread(self.model):  # what is compiled is bound to weights that stay where they are
            raise EvalError(
                f"the decode step of {type(self.model).__name__} cannot be compiled here: the model is spread over "
                f"{running_on(self.model)}, and parts of it come when they are called"
            )
        graph = _Graph(self._compile_options())
        # All that guards look at are the same objects with the same sizes; a window's length is a number of Python's.
        static = self._is_static()
        guards: Any = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe} if static else None
        run = torch.compile(self._own_function(), fullgraph=True, backend=graph.compile, options=guards)
        started = time.perf_counter()
        try:
            with _one_query(self.model):
                found = run(tokens)
        except Exception as error:  # the compiler's kinds of failure are many: no g++, a graph break, an operator
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EvalError(
                f"the decode step of {type(self.model).__name__} cannot be compiled here: {said}"
            ) from error
        self.build_seconds = time.perf_counter() - started
        self._run = (graph.bound(tokens) if static else None) or run
        return found


# Elements of a loop for each thread; shorter loops run on one, for waking another takes as long as thousands of them.
_WORTH_A_THREAD = 1 << 14


class _Graph:
    """What torch's compiler makes of a step, and with what it was called: the token, the cache, the weights."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._run: Any = None
        self._arguments: tuple[Any, ...] = ()
        self._results = 0

    def compile(self, module: GraphModule, examples: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
        """A backend for ``torch.compile``."""
        self._run = compile_fx(module, examples, config_patches=self._options)

        def first(*arguments: Any) -> Sequence[Tensor]:
            found = self._run(*arguments)
            self._arguments, self._results = arguments, len(found)
            return found

        return first

    def bound(self, tokens: Tensor) -> Step | None:
        """The step on the arguments of its first call, ``tokens`` aside; None where that is not all that it is.

        A graph with more results than the next token has side effects that are left to Python.
        """
        places = [place for place, argument in enumerate(self._arguments) if argument is tokens]
        if self._run is None or len(places) != 1 or self._results != 1:
            return None
        run, before, after = self._run, self._arguments[: places[0]], self._arguments[places[0] + 1 :]
        return lambda tokens: run(*before, tokens, *after)[0]


@contextlib.contextmanager
def _one_query(model: PreTrainedModel) -> Iterator[None]:
    """While it is entered the model's attention is made for one query, where SDPA is what it uses otherwise."""
    usual = model.config._attn_implementation
    if usual != "sdpa" or input_device(model).type != "cpu":
        yield
        return
    model.set_attn_implementation(ONE_QUERY)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)
