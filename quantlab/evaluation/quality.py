"""How good a model is on text, and how far from the model that it was made from."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from quantlab_evals import (
    DEFINITIONS,
    WINDOW_LENGTH,
    CalibrationMeasure,
    DivergenceMeasure,
    EvalError,
    LiveReference,
    NllMeasure,
    Reference,
    TextSource,
    TokenMeasure,
    Windows,
    check_length,
    default_length,
    describe_model,
    load_text,
    prefix_token,
    recorded_reference,
    rolling_perplexity,
    run_measures,
    token_windows,
    windows_as,
)
from transformers import PreTrainedModel

from quantlab.engine.device import MEASURING, Placement, computing
from quantlab.errors import DataError
from quantlab.evaluation.record import Evaluation
from quantlab.evaluation.subject import Device, Subject, check_room, placed, tokenizer_of

Progress = Callable[[int, int], None]
"""Called with the windows done and the windows in all."""

Model = str | Path | PreTrainedModel
Bos = bool | Literal["auto"]

MEASURES = ("perplexity", "divergence", "calibration", "words")


@dataclass(frozen=True)
class _Plan:
    """What is measured, on what: checked before a model is loaded."""

    measures: tuple[str, ...]
    original: Subject | None
    source: TextSource
    tokenizer: Any
    windows: Windows
    notes: tuple[str, ...]
    batch_size: int
    progress: Progress | None


def evaluate(
    model: Model,
    text: str | Sequence[str] = "builtin:eval",
    *,
    against: Model | None = None,
    measures: Sequence[str] | None = None,
    definition: str = "quantlab",
    length: int | None = None,
    windows: int | None = None,
    bos: Bos = "auto",
    batch_size: int = 1,
    cache: str | Path | None = None,
    device: Device = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a causal language model: its perplexity and, ``against`` its original, how far it is from it.

    Text and settings are checked before a model is loaded. Against an original both are in memory at once,
    unless there is a ``cache``.

    Args:
        model: a folder, quantized or not, a ``.gguf`` file, a Hugging Face id, ``demo``, a model in memory.
        text: a source as :func:`quantlab_evals.load_text` has them, or a list of documents.
        against: the model that it was made from, for KL divergence, agreement and the ratio of perplexities.
        measures: out of ``MEASURES``; perplexity is always one of them. None: perplexity, and divergence
            where there is an original. ``words`` is lm-eval's perplexity a word, each document by itself.
        definition: of perplexity: quantlab's own, or ``gptq`` or ``llama.cpp`` for figures to compare with theirs.
        length: tokens in a window, BOS included. None: 2048, or as many as the models have positions and the
            text has tokens; the definition's own for one of the others.
        windows: how many windows, from the start of the text; None: all.
        bos: whether each window begins with BOS; ``"auto"``: where the model's tokenizer adds one.
        batch_size: windows that run through a model at once.
        cache: a folder for the original's predictions. They are recorded there once and read for every variant
            after that (:mod:`quantlab_evals.recording` says what they lose); the original is loaded only to record it.
        device: where both run: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: on the GPUs, and what has no room there in
            memory or on disk. None: on the CPU; a model in memory where it is.
        tokenizer: for a model in memory; otherwise the model's own is loaded.
        progress: told after each window.

    Raises:
        QuantlabError: there is no such model, tokenizer or device, a setting cannot be, or memory does not suffice.
        EvalError: text that is not found or too short, windows that are too long, models that cannot be
            compared.
    """
    placement = placed(device)
    subject = Subject.of(model, placement)
    plan = _plan(
        [subject],
        text,
        placement,
        against=against,
        measures=measures,
        definition=definition,
        length=length,
        windows=windows,
        bos=bos,
        batch_size=batch_size,
        tokenizer=tokenizer,
        progress=progress,
    )
    together = [subject] if plan.original is None or cache is not None else [subject, plan.original]
    check_room(together)
    with computing(MEASURING):
        return _measure(subject, plan, _reference(plan, None if cache is None else Path(cache)))


def evaluate_variants(
    models: Sequence[Model],
    text: str | Sequence[str] = "builtin:eval",
    *,
    cache: str | Path | None = None,
    device: Device = None,
    **settings: Any,
) -> Iterator[Evaluation]:
    """Measure several models on the same windows, one in memory at a time, and the original once.

    Without a ``cache`` the original's predictions are kept in a temporary folder meanwhile. The other settings
    are those of :func:`evaluate`; :func:`quantlab_evals.compare_divergences` and ``compare_perplexities`` say
    which differences are more than chance.
    """
    placement = placed(device)
    subjects = [Subject.of(model, placement) for model in models]
    with _cache_folder(cache) as folder:
        evaluator = Evaluator(text, cache=folder, subjects=subjects, placement=placement, **settings)
        for subject in subjects:
            yield evaluator.measure(subject)
            gc.collect()  # modules refer to each other in rings


class Evaluator:
    """Measures one model after another on the same windows, and the original once, when it is made.

    The settings are those of :func:`evaluate`.

    Args:
        text: see there.
        cache: a folder for the original's predictions.
        subjects: models that are known beforehand: windows are no longer than they can read.
        placement: where the original goes, and models that are no subjects yet.
        **settings: see there.
    """

    def __init__(
        self,
        text: str | Sequence[str],
        *,
        cache: Path,
        subjects: Sequence[Subject] = (),
        placement: Placement | None = None,
        **settings: Any,
    ) -> None:
        self._placement = placement
        self._plan = _plan(subjects, text, placement, **settings)
        for subject in subjects:
            check_room([subject])
        with computing(MEASURING):
            self._reference = _reference(self._plan, cache)

    def measure(self, model: Subject | Model, progress: Progress | None = None) -> Evaluation:
        """Measure a model, against the original if there is one."""
        return self._measured(model, self._told(progress), self._reference)

    def measure_alone(self, model: Subject | Model, progress: Progress | None = None) -> Evaluation:
        """Measure a model, which may be the original, against nothing."""
        return self._measured(model, replace(self._told(progress), original=None), None)

    def _measured(self, model: Subject | Model, plan: _Plan, reference: Reference | None) -> Evaluation:
        subject = model if isinstance(model, Subject) else Subject.of(model, self._placement)
        with computing(MEASURING):
            return _measure(subject, plan, reference)

    def _told(self, progress: Progress | None) -> _Plan:
        return self._plan if progress is None else replace(self._plan, progress=progress)


@contextmanager
def _cache_folder(cache: str | Path | None) -> Iterator[Path]:
    if cache is not None:
        yield Path(cache)
        return
    with tempfile.TemporaryDirectory(prefix="quantlab-") as folder:
        yield Path(folder)


def _plan(
    subjects: Sequence[Subject],
    text: str | Sequence[str],
    placement: Placement | None,
    *,
    against: Model | None = None,
    measures: Sequence[str] | None = None,
    definition: str = DEFINITIONS[0],
    length: int | None = None,
    windows: int | None = None,
    bos: Bos = "auto",
    batch_size: int = 1,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> _Plan:
    _check_settings(length, windows, bos, batch_size)
    original = None if against is None else Subject.of(against, placement)
    chosen = _chosen_measures(measures, original)
    everyone = [*subjects, *([] if original is None else [original])]
    source = load_text(text)
    tokenizer = tokenizer_of(everyone) if tokenizer is None else tokenizer
    if "words" in chosen:
        prefix_token(tokenizer)  # which it may not have: said before a model is loaded
    cut, notes = _windows(tokenizer, source, everyone, definition, length, windows, bos)
    return _Plan(
        chosen, original if "divergence" in chosen else None, source, tokenizer, cut, notes, batch_size, progress
    )


def _chosen_measures(measures: Sequence[str] | None, original: Subject | None) -> tuple[str, ...]:
    if measures is None:
        measures = MEASURES[:2] if original is not None else MEASURES[:1]
    for name in measures:
        if name not in MEASURES:
            raise DataError(f"measure {name!r}: use some of {', '.join(MEASURES)}")
    if "divergence" in measures and original is None:
        raise DataError("measure 'divergence' needs the original; name it: --against MODEL, or against=...")
    return tuple(measures)


def _measure(subject: Subject, plan: _Plan, reference: Reference | None) -> Evaluation:
    module = subject.loaded()
    size = subject.bytes(module)  # before it runs: bitsandbytes repacks its layers for a CPU when they are first called
    started = time.perf_counter()
    nll = NllMeasure(plan.windows, "the model")
    divergence = None
    if reference is not None:
        divergence = DivergenceMeasure(plan.windows, reference, batch_size=plan.batch_size)
    calibration = CalibrationMeasure(len(plan.windows)) if "calibration" in plan.measures else None
    running: list[TokenMeasure] = [each for each in (nll, divergence, calibration) if each is not None]
    run_measures(module, plan.windows, running, batch_size=plan.batch_size, progress=plan.progress)
    perplexity = nll.result(describe_model(module), batch_size=plan.batch_size, seed=0)
    words = None
    if "words" in plan.measures:
        words = rolling_perplexity(module, plan.tokenizer, plan.source.documents)
    original = plan.original
    return Evaluation(
        model=subject.name,
        against=original.name if original else None,
        text=plan.source.name,
        origin=plan.source.origin,
        perplexity=perplexity,
        divergence=divergence.result(perplexity) if divergence else None,
        calibration=calibration.result() if calibration else None,
        words=words,
        bytes=size,
        original_bytes=original.bytes() if original else None,
        seconds=time.perf_counter() - started,
        notes=plan.notes,
    )


def _reference(plan: _Plan, cache: Path | None) -> Reference | None:
    """The original, loaded, or from its record, which is made here if there is none."""
    if plan.original is None:
        return None
    if cache is None:
        return LiveReference(plan.original.loaded())
    return recorded_reference(
        cache,
        plan.original.fingerprint(),
        plan.windows,
        plan.original.loaded,
        batch_size=plan.batch_size,
        progress=plan.progress,
    )


def _check_settings(length: object, windows: object, bos: object, batch_size: object) -> None:
    for name, value, least in (("length", length, 2), ("windows", windows, 1), ("batch_size", batch_size, 1)):
        if name != "batch_size" and value is None:
            continue
        if type(value) is not int or value < least:
            raise DataError(f"{name} {value!r}: use a whole number, at least {least}")
    if bos not in ("auto", True, False):
        raise DataError(f"bos {bos!r}: use auto, true or false")


def _windows(
    tokenizer: Any,
    source: TextSource,
    subjects: Sequence[Subject],
    definition: str,
    length: int | None,
    limit: int | None,
    bos: Bos,
) -> tuple[Windows, tuple[str, ...]]:
    """Windows of the length that was asked for, or of the longest up to the default that there can be."""
    documents = source.documents
    if definition != DEFINITIONS[0]:
        if bos != "auto":
            raise DataError(f"bos {bos!r}: definition {definition!r} has its own rule; leave it at auto")
        length = default_length(definition) if length is None else length
    if length is not None:
        for subject in subjects:
            check_length(subject.config, length)
        if definition != DEFINITIONS[0]:
            return windows_as(definition, tokenizer, documents, length, limit=limit), ()
        return token_windows(tokenizer, documents, length, limit=limit, bos=bos), ()
    longest = min([WINDOW_LENGTH, *(subject.positions for subject in subjects if subject.positions)])
    why = "the model has no more positions"
    try:
        cut = token_windows(tokenizer, documents, longest, limit=limit, bos=bos)
    except EvalError:
        probe = token_windows(tokenizer, documents, 3, limit=1, bos=bos)  # also raises what is wrong otherwise
        longest, why = probe.stream_tokens + (probe.bos is not None), "the text has no more tokens"
        cut = token_windows(tokenizer, documents, longest, limit=limit, bos=bos)
    shortened = f"windows of {longest} tokens instead of {WINDOW_LENGTH}: {why}"
    return cut, (shortened,) if longest < WINDOW_LENGTH else ()
