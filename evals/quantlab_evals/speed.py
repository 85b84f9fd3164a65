"""How fast causal language models read a prompt and decode: several models in turns, so that they share the weather.

Each round gives every model one turn in each way to decode and with each batch size: a prompt of random tokens is read,
then tokens are decoded greedily on a static cache. Other work on the machine meets all models alike, and ratios of
medians hold where seconds do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .decoder import GreedyDecoder
from .errors import EvalError
from .logits import input_device, running_on
from .machine import Machine, describe_machine
from .timing import Timing, timed

Progress = Callable[[int, int, str], None]
"""Called with the turns done, the turns in all, and what comes next."""


@dataclass(frozen=True)
class SpeedSettings:
    """What is measured, and how often.

    Attributes:
        prompt_tokens: of a prompt.
        new_tokens: to decode after it; the first of them belongs to reading the prompt.
        batches: how many prompts at once: one measurement each.
        rounds: turns that each model gets.
        compiled: whether decoding is also measured with a compiled step, beside the eager one.
        cpp_wrapper: whether what is compiled gets a wrapper in C++, see :class:`~quantlab_evals.GreedyDecoder`.
        seed: of the prompts.
    """

    prompt_tokens: int = 128
    new_tokens: int = 64
    batches: tuple[int, ...] = (1,)
    rounds: int = 5
    compiled: bool = True
    cpp_wrapper: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("rounds", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise EvalError(f"{name} {value!r}: use a whole number, at least {least}")
        if not self.batches or any(type(batch) is not int or batch < 1 for batch in self.batches):
            raise EvalError(f"batches {list(self.batches)!r}: use one or more whole numbers, each at least 1")


@dataclass(frozen=True)
class Run:
    """One model, decoding one batch size in one way.

    Attributes:
        batch: prompts at once.
        compiled: whether the step was compiled.
        prompt_tokens: of one prompt; ``new_tokens`` were decoded for it.
        new_tokens: see there.
        prefill: from the prompt to its first token, which is known then: the time to first token.
        step: one further token for every prompt; of each round the mean over its tokens.
        build_seconds: what compiling took, once.
    """

    batch: int
    compiled: bool
    prompt_tokens: int
    new_tokens: int
    prefill: Timing
    step: Timing
    build_seconds: float

    @property
    def prefill_rate(self) -> float:
        """Tokens of prompts that are read in a second."""
        return self.batch * self.prompt_tokens / self.prefill.median

    @property
    def decode_rate(self) -> float:
        """Tokens that are decoded in a second, all prompts of the batch counted."""
        return self.batch / self.step.median

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping."""
        return {
            "batch": self.batch,
            "compiled": self.compiled,
            "build_seconds": self.build_seconds,
            "prefill_tokens_per_second": self.prefill_rate,
            "decode_tokens_per_second": self.decode_rate,
            "time_to_first_token": self.prefill.to_dict(),
            "step": self.step.to_dict(),
        }


@dataclass(frozen=True)
class Speed:
    """A model's speed.

    Attributes:
        name: what it was called.
        model_class: of transformers.
        dtype: of its activations.
        attention: transformers' word for how its prompts are read.
        runs: one for each batch size and way to decode.
        not_compiled: why there is no compiled run although one was asked for; empty otherwise.
        device: that it ran on, see :func:`~quantlab_evals.running_on`.
    """

    name: str
    model_class: str
    dtype: str
    attention: str
    runs: tuple[Run, ...]
    not_compiled: str = ""
    device: str = "cpu"

    def best(self, batch: int) -> Run:
        """The faster way to decode."""
        return max((run for run in self.runs if run.batch == batch), key=lambda run: run.decode_rate)

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping."""
        batches = dict.fromkeys(run.batch for run in self.runs)
        faster = {str(batch): "compiled" if self.best(batch).compiled else "eager" for batch in batches}
        plain = {key: getattr(self, key) for key in ("name", "model_class", "dtype", "attention", "device")}
        plain["not_compiled"] = self.not_compiled
        return {**plain, "cache": "static", "faster": faster, "runs": [run.to_dict() for run in self.runs]}


@dataclass(frozen=True)
class SpeedComparison:
    """What :func:`measure_speed` found, with all that it takes to find it again."""

    settings: SpeedSettings
    machine: Machine
    models: tuple[Speed, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping."""
        return {
            "settings": asdict(self.settings),
            "machine": asdict(self.machine),
            "models": [model.to_dict() for model in self.models],
        }


def measure_speed(
    models: Mapping[str, PreTrainedModel], settings: SpeedSettings | None = None, *, progress: Progress | None = None
) -> SpeedComparison:
    """Measure models in turns; see the module. They are in memory together, and each compiles once a batch size.

    Args:
        models: by what they are called, in eval mode.
        settings: what to measure.
        progress: told before each turn.

    Raises:
        EvalError: no models; one that cannot decode on a static cache, or not so many tokens.
    """
    settings = settings or SpeedSettings()
    if not models:
        raise EvalError("there is no model to measure")
    turns = [_Turn(name, model, batch, compiled, settings) for name, model, batch, compiled in _turns(models, settings)]
    total = len(turns) * (settings.rounds + 1)
    for index in range(settings.rounds + 1):
        # The first round compiles and warms up, uncounted. The order turns, so that nobody is always last.
        start = index % len(turns)
        for place, turn in enumerate(turns[start:] + turns[:start]):
            if progress is not None:
                progress(index * len(turns) + place, total, turn.label)
            turn.take(counted=index > 0)
    speeds = tuple(_speed(name, model, [turn for turn in turns if turn.name == name]) for name, model in models.items())
    machine = describe_machine(input_device(next(iter(models.values()))))
    return SpeedComparison(settings, machine, speeds)


def _turns(
    models: Mapping[str, PreTrainedModel], settings: SpeedSettings
) -> Iterator[tuple[str, PreTrainedModel, int, bool]]:
    """The models alternate in the inmost loop: what is compared runs close together in time."""
    for batch in settings.batches:
        for compiled in (False, True) if settings.compiled else (False,):
            for name, model in models.items():
                yield name, model, batch, compiled


class _Turn:
    """One model in one way of decoding, and what was measured of it so far."""

    def __init__(self, name: str, model: PreTrainedModel, batch: int, compiled: bool, settings: SpeedSettings) -> None:
        self.name, self.batch, self.compiled, self.settings = name, batch, compiled, settings
        self.label = f"{name}, batch {batch}, {'compiled' if compiled else 'eager'}"
        vocabulary = model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(settings.seed)
        self.prompt = torch.randint(vocabulary, (batch, settings.prompt_tokens), generator=generator)
        length = settings.prompt_tokens + settings.new_tokens
        options = {"compiled": compiled, "cpp_wrapper": settings.cpp_wrapper}
        self.decoder = GreedyDecoder(model, length, batch=batch, **options)
        self.prefill: list[tuple[float, float]] = []
        self.step: list[tuple[float, float]] = []
        self.failure = ""

    def take(self, *, counted: bool) -> None:
        """Read the prompt and decode; a step that cannot be compiled is noted and not tried again."""
        if self.failure:
            return
        token, reading = timed(lambda: self._known(self.decoder.prefill(self.prompt)))
        if not counted:  # one step is enough to compile and to warm up
            try:
                self.decoder.step(token)
            except EvalError as error:
                self.failure = str(error)
            return
        steps = self.settings.new_tokens - 1
        _, decoding = timed(lambda: self._decode(token, steps))
        self.prefill.append(reading)
        self.step.append((decoding[0] / steps, decoding[1] / steps))

    def _decode(self, token: Tensor, steps: int) -> None:
        for _ in range(steps):
            token = self._known(self.decoder.step(token))

    def _known(self, token: Tensor) -> Tensor:
        """The token, once it is computed and can be shown."""
        token[0, 0].item()
        return token

    def run(self) -> Run:
        """What was measured."""
        prompt, new = self.settings.prompt_tokens, self.settings.new_tokens
        timings = Timing.of(self.prefill), Timing.of(self.step)
        return Run(self.batch, self.compiled, prompt, new, *timings, self.decoder.build_seconds)


def _speed(name: str, model: PreTrainedModel, turns: list[_Turn]) -> Speed:
    return Speed(
        name=name,
        model_class=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        attention=getattr(model.config, "_attn_implementation", None) or "unknown",
        runs=tuple(turn.run() for turn in turns if not turn.failure),
        not_compiled=next((turn.failure for turn in turns if turn.failure), ""),
        device=running_on(model),
    )
