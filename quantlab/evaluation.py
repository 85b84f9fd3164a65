"""How good a model is, and how far from the model that it was made from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from quantlab_evals import (
    WINDOW_LENGTH,
    Divergence,
    EvalError,
    Perplexity,
    TextSource,
    Windows,
    check_length,
    divergence,
    load_text,
    perplexity,
    token_windows,
)
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from quantlab.checkpoint.load import load
from quantlab.checkpoint.placement import parameter_bytes
from quantlab.checkpoint.resolve import resolve
from quantlab.checkpoint.weights import WeightFiles
from quantlab.errors import CheckpointError, DataError

Progress = Callable[[int, int], None]
"""Called with the windows done and the windows in all."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model, and every choice that was made for it.

    Attributes:
        model: what was measured.
        against: its original, or None.
        text: the name of the text, and ``origin`` where it comes from.
        origin: see ``text``.
        perplexity: of the model, with its interval and the settings of the measurement.
        divergence: from the original, with the original's perplexity; None without one.
        bytes: of the model's weights.
        original_bytes: of the original's, or None.
        seconds: that measuring took, without loading.
        notes: choices that the text or the models left no other way.
    """

    model: str
    against: str | None
    text: str
    origin: str
    perplexity: Perplexity
    divergence: Divergence | None
    bytes: int
    original_bytes: int | None
    seconds: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able mapping; the settings, which all figures share, stand in it once."""
        flat = asdict(self)
        flat["settings"] = flat["perplexity"].pop("settings")
        if self.divergence is not None:
            parts = flat["divergence"]
            parts["definition"] = parts.pop("settings")["definition"]
            parts["reference"].pop("settings")
            del parts["model"]  # the perplexity above
            difference = self.divergence.difference
            parts["difference"] |= {
                "perplexity_ratio": difference.perplexity_ratio,
                "perplexity_ratio_interval": difference.perplexity_ratio_interval,
            }
        return flat

    def to_markdown(self) -> str:
        """A page with the figures in one table and every choice below it."""
        quality, original = self.perplexity, self.divergence.reference if self.divergence else None
        rows = [
            ("size of the weights", _megabytes(self.original_bytes), _megabytes(self.bytes)),
            ("perplexity", _with_interval(original), _with_interval(quality)),
        ]
        if self.divergence is not None:
            found = self.divergence
            rows += [
                ("perplexity, relative", "1", f"{found.difference.perplexity_ratio:.4f}"),
                ("mean KL divergence", "0", f"{found.kl:.4f}"),
                ("99th percentile KL", "0", f"{found.kl_p99:.3f}"),
                ("top-1 agreement", "100 %", f"{found.agreement:.2%}"),
            ]
        table = [f"| {name} | {before} | {after} |" for name, before, after in rows]
        choices = [f"* {name}: {value}" for name, value in self.perplexity.settings.items()]
        return "\n".join(
            [
                f"# {self.model}",
                "",
                f"Measured on {self.text} ({self.origin}).",
                "",
                f"| | {self.against or 'original (not measured)'} | {self.model} |",
                "|---|---|---|",
                *table,
                "",
                "Intervals are 95 % bootstrap intervals over windows.",
                "",
                *choices,
                *(f"* {note}" for note in self.notes),
                "",
            ]
        )


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f} MB"


def _with_interval(found: Perplexity | None) -> str:
    if found is None:
        return ""
    interval = f" ({found.interval[0]:.2f} to {found.interval[1]:.2f})" if found.interval else ""
    return f"{found.perplexity:.3f}{interval}"


@dataclass(frozen=True)
class _Subject:
    """A model to be measured: in memory, or in a folder from which it is loaded late."""

    name: str
    config: Any
    module: PreTrainedModel | None
    folder: Path | None

    def loaded(self) -> PreTrainedModel:
        if self.module is not None:
            return self.module
        assert self.folder is not None
        return load(self.folder)

    def size(self, module: PreTrainedModel) -> int:
        if self.folder is None:
            return parameter_bytes(module)
        return sum(file.stat().st_size for file in WeightFiles(self.folder).files)


def evaluate(
    model: str | Path | PreTrainedModel,
    text: str | Sequence[str] = "builtin:eval",
    *,
    against: str | Path | PreTrainedModel | None = None,
    length: int | None = None,
    windows: int | None = None,
    bos: bool | Literal["auto"] = "auto",
    batch_size: int = 1,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a causal language model: its perplexity and, ``against`` its original, how far it is from it.

    Text and settings are checked before a model is loaded. Against an original both are in memory at once.

    Args:
        model: a folder, quantized or not, a ``.gguf`` file, a Hugging Face id, ``demo``, a model in memory.
        text: a source as :func:`quantlab_evals.load_text` has them, or a list of documents.
        against: the model that it was made from, for KL divergence, agreement and the ratio of perplexities.
        length: tokens in a window, BOS included. None: 2048, or as many as the models have positions and the
            text has tokens.
        windows: how many windows, from the start of the text; None: all.
        bos: whether each window begins with BOS; ``"auto"``: where the model's tokenizer adds one.
        batch_size: windows that run through a model at once.
        tokenizer: for a model in memory; otherwise the model's own is loaded.
        progress: told after each window.

    Raises:
        QuantlabError: there is no such model or tokenizer, or a setting cannot be.
        EvalError: text that is not found or too short, windows that are too long, models that cannot be
            compared.
    """
    _check_settings(length, windows, bos, batch_size)
    subjects = [_subject(which) for which in (model, against) if which is not None]
    source = load_text(text)
    if tokenizer is None:
        tokenizer = _tokenizer(subjects)
    cut, notes = _windows(tokenizer, source, [subject.config for subject in subjects], length, windows, bos)

    modules = [subject.loaded() for subject in subjects]
    started = time.perf_counter()
    compared = None
    if len(modules) == 2:
        compared = divergence(modules[0], modules[1], cut, batch_size=batch_size, progress=progress)
        measured = compared.model
    else:
        measured = perplexity(modules[0], cut, batch_size=batch_size, progress=progress)
    seconds = time.perf_counter() - started
    sizes = [subject.size(module) for subject, module in zip(subjects, modules, strict=True)]
    return Evaluation(
        model=subjects[0].name,
        against=subjects[1].name if compared else None,
        text=source.name,
        origin=source.origin,
        perplexity=measured,
        divergence=compared,
        bytes=sizes[0],
        original_bytes=sizes[1] if compared else None,
        seconds=seconds,
        notes=notes,
    )


def _check_settings(length: object, windows: object, bos: object, batch_size: object) -> None:
    for name, value, least in (("length", length, 2), ("windows", windows, 1), ("batch_size", batch_size, 1)):
        if name != "batch_size" and value is None:
            continue
        if type(value) is not int or value < least:
            raise DataError(f"{name} {value!r}: use a whole number, at least {least}")
    if bos not in ("auto", True, False):
        raise DataError(f"bos {bos!r}: use auto, true or false")


def _subject(model: str | Path | PreTrainedModel) -> _Subject:
    if isinstance(model, PreTrainedModel):
        return _Subject(model.config.name_or_path or type(model).__name__, model.config, model, None)
    folder = resolve(model)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{model}: its config.json cannot be read: {error}") from error
    return _Subject(str(model), config, None, folder)


def _tokenizer(subjects: Sequence[_Subject]) -> Any:
    """The tokenizer of the first that has one: a model and its original read text alike."""
    folders = [subject.folder for subject in subjects if subject.folder is not None]
    failures = []
    for folder in folders:
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises many kinds
            failures.append(f"{folder}: its tokenizer cannot be loaded: {error}")
    raise CheckpointError("; ".join(failures) or "a model in memory has no tokenizer; pass one: tokenizer=...")


def _windows(
    tokenizer: Any,
    source: TextSource,
    configs: Sequence[Any],
    length: int | None,
    limit: int | None,
    bos: bool | Literal["auto"],
) -> tuple[Windows, tuple[str, ...]]:
    """Windows of the length that was asked for, or of the longest up to the default that there can be."""
    documents = source.documents
    if length is not None:
        for config in configs:
            check_length(config, length)
        return token_windows(tokenizer, documents, length, limit=limit, bos=bos), ()
    longest = min([WINDOW_LENGTH, *(positions for config in configs if (positions := _positions(config)))])
    why = "the model has no more positions"
    try:
        cut = token_windows(tokenizer, documents, longest, limit=limit, bos=bos)
    except EvalError:
        probe = token_windows(tokenizer, documents, 3, limit=1, bos=bos)  # also raises what is wrong otherwise
        longest, why = probe.stream_tokens + (probe.bos is not None), "the text has no more tokens"
        cut = token_windows(tokenizer, documents, longest, limit=limit, bos=bos)
    shortened = f"windows of {longest} tokens instead of {WINDOW_LENGTH}: {why}"
    return cut, (shortened,) if longest < WINDOW_LENGTH else ()


def _positions(config: Any) -> int | None:
    """How many positions a model has; None if it does not say."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None
