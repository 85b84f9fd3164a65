"""A reference's predictions on disk: computed once, read for every variant that is compared with it.

Of each position the `TOP_K` most likely tokens are kept, the probability of all others together, and a sample
of them: one probability for the whole tail would make every KL divergence too small (by 5 to 10 % with 256
tokens of 49152), and a sample leaves its mean as it is. At a few positions a window the whole distribution is
kept, too, so that every comparison measures what the record costs (`RecordLoss`).

A record lies under a name that is a hash of everything it depends on (the model's files or weights, the
windows' tokens, the versions of torch and transformers), so one that is out of date is not found.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import EvalError
from .logits import Progress, describe_model, run_measures
from .perplexity import token_nll
from .recorded import ABOUT, RecordedReference, window_file
from .windows import Windows

TOP_K = 256
"""Tokens kept of each position, the most likely ones."""
SAMPLED = 128
"""Tokens drawn from the others at each position; with the former, 3 KiB."""
WHOLE = 8
"""Positions of a window at which the whole distribution is kept."""

_FORMAT = 1
_ABANDONED = 24 * 3600.0


def recorded_reference(
    folder: str | Path,
    identity: str,
    windows: Windows,
    load: Callable[[], nn.Module],
    *,
    top_k: int = TOP_K,
    sampled: int = SAMPLED,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> RecordedReference:
    """The record of a model's predictions on windows, from `folder`, or made there.

    `identity` says which model it is (`fingerprint_folder`, `fingerprint_model`; and, where `load` does not just
    load it, in which dtype or on which device). `load` is not called where there is a record. A record appears
    whole or not at all, also if several processes make it at the same time. Raises `EvalError` as `perplexity`
    does, or if the folder cannot be written.
    """
    for name, value in (("top_k", top_k), ("sampled", sampled)):
        if value < 1:
            raise EvalError(f"{name} is {value}, a number of tokens; use 1 or more")
    depends_on = {
        "format": _FORMAT,
        "identity": identity,
        "windows": windows.describe(),
        "top_k": top_k,
        "sampled": sampled,
        "whole": WHOLE,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]
    place = Path(folder).expanduser() / key
    if _is_whole(place, len(windows)):
        return RecordedReference(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(place)
        partial = place.with_name(f".{key}-{uuid.uuid4().hex[:8]}")
        partial.mkdir()
    except OSError as error:
        raise EvalError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        _write(partial, load(), windows, depends_on, batch_size, progress)
        try:
            partial.rename(place)
        except OSError:  # another process was faster, or a damaged one lies there
            if not _is_whole(place, len(windows)):
                shutil.rmtree(place)
                partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return RecordedReference(place)


def fingerprint_folder(folder: str | Path) -> str:
    """SHA-256 over the names and contents of the files in a model's folder (not of its subfolders)."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def fingerprint_model(model: nn.Module) -> str:
    """SHA-256 over a model's class, configuration, and its parameters' and buffers' names, dtypes and values.

    Raises `EvalError` if its weights are not in memory.
    """
    digest = hashlib.sha256(type(model).__qualname__.encode())
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_json_string"):
        digest.update(config.to_json_string(use_diff=False).encode())
    digest.update(json.dumps(describe_model(model), sort_keys=True).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type == "meta":
            raise EvalError(f"{name} is offloaded, so the model in memory has no fingerprint; give its folder instead")
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Recorder:
    """Writes each window to a file of its own as its last position comes in."""

    def __init__(self, folder: Path, windows: Windows, top_k: int, sampled: int) -> None:
        self.folder = folder
        self.top_k = top_k
        self.sampled = sampled
        self.vocabulary = 0
        # Not the first positions alone: predictions sharpen along a window.
        count = min(WHOLE, windows.predicted)
        self.whole_at = ((torch.arange(count) + 0.5) * windows.predicted / count).long()
        self._parts: list[dict[str, Tensor]] = []

    def add(self, window: int, part: slice, log_q: Tensor, targets: Tensor) -> None:
        """Keep what a record holds of some positions."""
        nll = token_nll(log_q, targets)
        if nll.isnan().any():
            raise EvalError(
                f"window {window}: the logits of the reference are NaN or infinite; if its dtype is float16, "
                "run it in bfloat16 or float32"
            )
        self.vocabulary = log_q.shape[-1]
        log_p, indices = log_q.topk(min(self.top_k, self.vocabulary))
        rest = log_q.scatter(-1, indices, -torch.inf)
        sample = self._draw(rest, seed=(window << 32) + part.start)
        here = (self.whole_at >= part.start) & (self.whole_at < part.start + len(log_q))
        rows = (self.whole_at[here] - part.start).to(log_q.device)
        kept = {
            "indices": indices.int(),
            "log_p": log_p,
            "log_tail": rest.logsumexp(-1),
            "sample": sample.int(),
            "sample_log_p": log_q.gather(-1, sample),
            "top": log_q.argmax(-1).int(),  # of several equal ones topk may name another first
            "nll": nll,
            "whole_at": self.whole_at[here],
            "whole": log_q[rows],
        }
        self._parts.append({name: tensor.cpu() for name, tensor in kept.items()})

    def _draw(self, rest: Tensor, seed: int) -> Tensor:
        """Tokens in proportion to their probability, `[n, sampled]`; none where none are left."""
        if self.top_k >= self.vocabulary:
            return torch.empty(len(rest), 0, dtype=torch.int64, device=rest.device)
        weights = rest.exp()
        weights[weights.sum(-1) == 0] = 1  # the mass is zero, whichever is drawn
        generator = torch.Generator(rest.device).manual_seed(seed)
        return weights.multinomial(self.sampled, replacement=True, generator=generator)

    def end_window(self, window: int) -> None:
        """Write the window."""
        tensors = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        save_file(tensors, self.folder / window_file(window))
        self._parts = []


def _write(
    folder: Path,
    model: nn.Module,
    windows: Windows,
    depends_on: dict[str, Any],
    batch_size: int,
    progress: Progress | None,
) -> None:
    recorder = _Recorder(folder, windows, depends_on["top_k"], depends_on["sampled"])
    run_measures(model, windows, [recorder], batch_size=batch_size, progress=progress)
    about = {
        **depends_on,
        "top_k": min(depends_on["top_k"], recorder.vocabulary),
        "vocabulary": recorder.vocabulary,
        "model": describe_model(model),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")


def _is_whole(place: Path, windows: int) -> bool:
    """Whether a record is there, with files of the sizes that were written."""
    try:
        files = json.loads((place / ABOUT).read_text(encoding="utf-8"))["files"]
        sizes = {name: (place / name).stat().st_size for name in files}
    except (OSError, ValueError, KeyError):
        return False
    return len(files) == windows and sizes == files


def _remove_abandoned(place: Path) -> None:
    """Remove what processes that were killed left of the same record; one that is alive adds files all the time."""
    for partial in place.parent.glob(f".{place.name}-*"):
        if time.time() - os.stat(partial).st_mtime > _ABANDONED:
            shutil.rmtree(partial, ignore_errors=True)
