"""What variants of a model write under many settings: speed, memory, repetition, and how the original sees it."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from quantlab_evals import (
    EvalError,
    Sampling,
    check_length,
    distinct,
    generate,
    load_text,
    repetition,
    running_on,
    score,
    token_windows,
)
from transformers import PreTrainedModel

from quantlab.engine.device import MEASURING, computing
from quantlab.errors import DataError, QuantlabError
from quantlab.evaluation.records import Records
from quantlab.evaluation.subject import Device, Subject, placed, tokenizer_of

Progress = Callable[[int, int], None]
"""Called with the cells done and the cells in all."""

_CLEAR_PEAK = "5"  # what /proc/self/clear_refs takes to forget the largest size


def generation_sweep(
    models: Sequence[str | Path],
    grid: Sequence[Sampling],
    out: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Sequence[str] = "builtin:eval",
    prompts: int = 8,
    prompt_length: int = 32,
    seed: int = 0,
    device: Device = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Let every model write under every setting, one model in memory at a time; a record a cell.

    ``out/generated.jsonl`` holds what was written, with its speed; ``out/cells.jsonl`` the same with the text's
    perplexity and agreement under the original. A sweep that was stopped goes on; a cell that failed is recorded
    with its error, the others go on, and it is tried again the next time. Seeds are fixed: prompt ``i`` is
    continued with ``seed + i`` in every cell.

    Args:
        models: folders, ids, ``bitsandbytes:KIND:MODEL``.
        grid: settings, see :func:`quantlab_evals.sampling_grid`.
        out: a folder for the records.
        against: the original, under which the text is scored; None: it is not.
        text: where prompts are cut from, evenly spread.
        prompts: how many.
        prompt_length: tokens of each.
        seed: of the first prompt.
        device: where models run, as in :func:`quantlab.evaluate`. A cell of one kind of device is none of another's.
        progress: told after each cell.

    Returns:
        The records in the order of models and grid, with ``tokens_per_second`` (prompt included),
        ``peak_memory`` (of the process on a CPU, of tensors on a GPU), ``weight_bytes``, ``repetition_4``,
        ``distinct_1`` to ``distinct_3``, ``perplexity`` under itself, ``original_perplexity`` and
        ``original_agreement``; or ``error``.

    Raises:
        QuantlabError: there is no such model or device, or no cell.
        EvalError: text that is not found or too short, prompts and answers longer than a model's positions.
    """
    if not grid or not models:
        raise DataError("a sweep needs a model and a setting")
    placement = placed(device)
    subjects = [Subject.of(model, placement) for model in models]
    original = None if against is None else Subject.of(against, placement)
    everyone = [*subjects, *([] if original is None else [original])]
    longest = prompt_length + max(sampling.max_new_tokens for sampling in grid)
    for subject in everyone:
        check_length(subject.config, longest)
    prompt_tokens = _prompts(tokenizer_of(everyone), text, prompts, prompt_length)

    written = Records(Path(out) / "generated.jsonl")
    scored = Records(Path(out) / "cells.jsonl")
    fingerprints = [subject.fingerprint() for subject in subjects]
    cells = [
        (subject, sampling, _key(fingerprint, sampling, prompt_tokens, seed))
        for subject, fingerprint in zip(subjects, fingerprints, strict=True)
        for sampling in grid
    ]
    results: dict[str, dict[str, Any]] = {}
    done = itertools.count(1 + sum(written.get(key) is not None for _, _, key in cells))
    for subject in subjects:
        waiting = [(s, key) for owner, s, key in cells if owner is subject and written.get(key) is None]
        for key, record in _write(subject, waiting, prompt_tokens, seed, written):
            if "error" in record:
                results[key] = record
            if progress is not None:
                progress(next(done), len(cells))
    if original is not None:
        prefix = original.fingerprint()[:16]
        with computing(MEASURING):
            results |= _score(original, prefix, cells, prompt_tokens, written, scored)
    return [_without_text(results.get(key) or _known(written, key)) for _, _, key in cells]


def _prompts(tokenizer: Any, text: str | Sequence[str], count: int, length: int) -> list[list[int]]:
    """Prompts that lie evenly spread over a text."""
    if count < 1:
        raise DataError(f"prompts {count}: use 1 or more")
    windows = token_windows(tokenizer, load_text(text).documents, length).tokens
    if len(windows) < count:
        raise DataError(
            f"the text has {len(windows)} prompts of {length} tokens, and {count} were asked for; ask for less"
        )
    rows = torch.arange(count) * len(windows) // count
    return [[int(token) for token in row] for row in windows[rows]]


def _key(fingerprint: str, sampling: Sampling, prompts: list[list[int]], seed: int) -> str:
    depends_on = [fingerprint, asdict(sampling), prompts, seed]
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:32]


def _write(
    subject: Subject, waiting: list[tuple[Sampling, str]], prompts: list[list[int]], seed: int, written: Records
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Generate the cells of one model that are not there yet; yield each key with its record."""
    if not waiting:
        return
    model, weights, failure = None, 0, ""
    try:
        with computing(MEASURING):
            model = subject.loaded()
        weights = subject.bytes(model)
    except QuantlabError as error:
        failure = str(error)
    for sampling, key in waiting:
        about = {"model": subject.name, **asdict(sampling)}
        if model is None:
            yield key, written.append(key, {**about, "error": failure})
            continue
        try:
            with computing(MEASURING):
                record = {**about, "weight_bytes": weights, **_cell(model, sampling, prompts, seed)}
        except (QuantlabError, EvalError, RuntimeError) as error:  # out of memory of the process is a RuntimeError
            record = {**about, "error": str(error)}
        yield key, written.append(key, record)
    del model
    gc.collect()


def _cell(model: PreTrainedModel, sampling: Sampling, prompts: list[list[int]], seed: int) -> dict[str, Any]:
    generate(model, prompts[0], Sampling(max_new_tokens=1))  # what happens once is not this cell's speed
    _forget_peak(model)
    started = time.perf_counter()
    answers = [generate(model, prompt, sampling, seed=seed + i)[0] for i, prompt in enumerate(prompts)]
    seconds = time.perf_counter() - started
    tokens = sum(map(len, answers))
    return {
        "seed": seed,
        "prompts": len(prompts),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory": _peak(model),
        "repetition_4": repetition(answers),
        **{f"distinct_{n}": distinct(answers, n) for n in (1, 2, 3)},
        "perplexity": score(model, prompts, answers).perplexity if tokens else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": running_on(model),
        "answers": answers,
    }


def _score(
    original: Subject,
    prefix: str,
    cells: Sequence[tuple[Subject, Sampling, str]],
    prompts: list[list[int]],
    written: Records,
    scored: Records,
) -> dict[str, dict[str, Any]]:
    """Each cell with its text's figures under the original, which is loaded if one is missing."""
    results = {}
    model = None
    for _, _, key in cells:
        cell = written.get(key)
        if cell is None:
            continue
        full = scored.get(f"{prefix}-{key}")
        if full is None:
            model = original.loaded() if model is None else model
            found = score(model, prompts, cell["answers"]) if cell["tokens"] else None
            figures = {
                "original": original.name,
                "original_perplexity": None if found is None else found.perplexity,
                "original_agreement": None if found is None else found.agreement,
            }
            full = scored.append(f"{prefix}-{key}", {**_without_text(cell), **figures})
        results[key] = full
    return results


def _known(written: Records, key: str) -> dict[str, Any]:
    cell = written.get(key)
    assert cell is not None  # it was written, or its failure is among the results
    return cell


def _without_text(cell: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in cell.items() if name not in ("answers", "key")}


def _forget_peak(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        return
    try:
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK, encoding="ascii")
    except OSError:  # then the peak is that of the process's whole life
        return


def _peak(model: PreTrainedModel) -> int | None:
    """Bytes: the most that tensors took on a GPU, or the process on a CPU, since `_forget_peak`."""
    if model.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(model.device))
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
