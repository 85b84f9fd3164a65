"""The checks, one after another, of a folder that quantlab wrote or of what was exported from it.

What the folder *means* is computed twice, by ways that share nothing but the files: here its codes are decoded one
module at a time and run through transformers' own layers in float32; and a fresh process loads it as its users do. The
first is kept beside the model as a digest, which later checks, and those of exported files, are held against.

Both are float32 wherever the loader can be, so that only the order of sums is between them: a difference in one scale
shows, which would be lost in what bfloat16 leaves out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantlab.checkpoint.cache import cache_dir
from quantlab.checkpoint.gguf import cached_gguf, gguf_weights, import_gguf
from quantlab.checkpoint.native import QUANT_METHOD
from quantlab.checkpoint.quantized import DIGEST, QuantizedFolder
from quantlab.checkpoint.resolve import resolve
from quantlab.checkpoint.source import open_source
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.errors import CheckpointError
from quantlab.verification import checks, loader
from quantlab.verification.digest import Digest, prompts_for
from quantlab.verification.limits import ROUNDED_INPUTS, largest_difference
from quantlab.verification.streamed import decoded_logits, original_logits


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: what was checked.
        passed: whether it is so; None if it could not be checked here, or is only to be known.
        detail: figures, or what is wrong.
    """

    name: str
    passed: bool | None
    detail: str = ""


@dataclass(frozen=True)
class Verification:
    """What was checked of a model."""

    path: Path
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return all(check.passed is not False for check in self.checks)

    @property
    def failure(self) -> str:
        """What is wrong, in a sentence; empty if nothing."""
        wrong = [f"{check.name}: {check.detail}" for check in self.checks if check.passed is False]
        return "; ".join(wrong)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able mapping."""
        return {"path": str(self.path), "passed": self.passed, "checks": [asdict(check) for check in self.checks]}


def verify(path: str | Path, against: str | Path | None = None) -> Verification:
    """Check a quantized model, or what was exported from one.

    Args:
        path: a folder that quantlab wrote, one that it exported, or a ``.gguf`` file.
        against: what its predictions are held against. For a folder of quantlab's its own codes are, always; a model
            that is not quantized can be given to see how far the two are apart. For an exported one: the folder that it
            was exported from, unless a digest lies beside it.

    Raises:
        CheckpointError: there is no such model, or nothing to hold it against.
    """
    path = Path(path).expanduser()
    other = None if against is None else resolve(against)
    if path.suffix == ".gguf":
        digest, source = _reference(path.parent, other)
        with _imported(path) as (folder, inexact):
            found = _load_checks(folder, digest, "this package's GGUF reader", source, inexact)
            return Verification(path, tuple(found))
    if loader.quant_method(path) != QUANT_METHOD:
        digest, source = _reference(path, other)
        found = _load_checks(path, digest, "transformers", source, loader.inexact_layers(path))
        return Verification(path, tuple(found))
    opened = QuantizedFolder(path)
    found = _static_checks(opened)
    stored = Digest.stored(path)
    prompts = stored.prompts if stored else _prompts(opened)
    try:
        logits, shaken = _logits(partial(decoded_logits, opened), prompts)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:  # a decoder's own ids, a picture
        reason = " ".join(str(error).split())
        return Verification(path, (*found, Check("predictions", None, f"it does not run on token ids alone: {reason}")))
    found.append(Check("predictions are numbers", bool(logits.isfinite().all())))
    if not found[-1].passed:
        return Verification(path, tuple(found))
    now = Digest.of(prompts, logits, shaken)
    rounds = loader.rounds_inputs(path)
    if stored is not None:
        same = replace(stored, sensitivity=now.sensitivity)
        found.append(compared("predictions are those of the stored digest", same, same.gathered(logits), rounds))
    if stored is None or (stored.sensitivity is None and found[-1].passed):
        CheckpointWriter(path).write_json(DIGEST, now.to_dict())
    if other is not None:
        far = now.divergence(now.gathered(original_logits(open_source(other), prompts)))
        found.append(Check("distance from the original", None, f"{far:.4f} nats a token"))
    return Verification(path, (*found, *_load_checks(path, now, "transformers with quantlab")))


def _static_checks(folder: QuantizedFolder) -> list[Check]:
    unsound, unlike = checks.unsound_tensors(folder), checks.unlike_recipe(folder)
    found = [Check("tensors are sound", not unsound, _some(unsound) or f"{len(folder.files.stored)} tensors")]
    if unlike is None:
        found.append(Check("layers are what the recipe says", None, "the folder has no recipe.yaml"))
    else:
        found.append(
            Check("layers are what the recipe says", not unlike, _some(unlike) or f"{len(folder.layers)} layers")
        )
    differing = checks.differing_sets(folder)
    found.append(
        Check(
            "layers that servers fuse are alike", None if differing else True, _some(differing) or "q/k/v and gate/up"
        )
    )
    return found


def _load_checks(
    folder: Path, digest: Digest, loaded_by: str, source: QuantizedFolder | None = None, inexact: int = 0
) -> list[Check]:
    """Load the folder in a process of its own and hold its predictions against a digest.

    Args:
        folder: what is loaded.
        digest: what it is to say.
        loaded_by: who loads it.
        source: the folder that it was exported from, if that is known.
        inexact: how many layers are not what the codes meant.
    """
    name = f"{loaded_by} loads it, in a process of its own"
    dtype, reason = loader.affordable(folder)
    if dtype is None:
        return [Check(name, None, reason)]
    answer = loader.answer(folder, dtype, digest)
    if "missing" in answer:
        return [Check(name, None, f"not tried: {answer['missing']}")]
    if "error" in answer:
        return [Check(name, False, answer["error"])]
    odd = "; ".join(f"{key}: {', '.join(names)}" for key, names in answer["odd"].items())
    found = [Check(name, not odd, "; ".join(filter(None, (odd, reason))))]
    if answer["tied"] is not None:
        said = "tied" if answer["ties"] else "not tied"
        found.append(Check("head and embedding are what config.json says", answer["tied"] == answer["ties"], said))
    computed, decoded = answer["computed"], next(iter(answer["decoded"].values()), "float32")
    if computed == "float32" != decoded and source is not None and _rounded_once(source):
        through = {name: getattr(torch, dtype) for name, dtype in answer["decoded"].items()}
        logits = decoded_logits(source, digest.prompts, through=through)
        digest, decoded = replace(digest, logprobs=digest.gathered(logits)), "float32"
    check = "its predictions are those of the codes"
    if inexact:
        far = f"{digest.divergence(answer['logprobs']):.1e} nats a token apart"
        return [*found, Check(check, None, f"{far}: {inexact} layers were made something else when it was exported")]
    found.append(compared(check, digest, answer["logprobs"], loader.rounds_inputs(folder), computed, decoded))
    return found


def _rounded_once(source: QuantizedFolder) -> bool:
    """Whether a loader that decodes to 16 bits rounds each weight once, and not its scales of two levels before."""
    return not any(storage.outer_scales for storage in source.layers.values())


def compared(
    name: str,
    digest: Digest,
    logprobs: list[list[list[float]]],
    rounds_inputs: bool,
    computed: str = "float32",
    decoded: str = "float32",
) -> Check:
    """Whether log-probabilities are those of a digest but for rounding.

    Args:
        name: of the check.
        digest: what they should be.
        logprobs: of the digest's tokens.
        rounds_inputs: whether the model rounds its inputs to 8 bits.
        computed: the dtype that they were computed in.
        decoded: the dtype that weights were decoded to.
    """
    if rounds_inputs:
        far = digest.divergence(logprobs)
        return Check(name, far <= ROUNDED_INPUTS, f"{far:.1e} nats a token apart, {ROUNDED_INPUTS:g} allowed")
    far, limit = digest.difference(logprobs), largest_difference(digest.sensitivity, computed, decoded)
    apart = f"log-probabilities at most {far:.1e} apart"
    if limit is None:
        unknown = f"what rounding to {decoded} does to this model the digest, an older quantlab's, does not say"
        return Check(name, None, f"{apart}; {unknown}; name the folder that it was exported from: --against DIR")
    ways = [f"computed in {computed}"] if computed != "float32" else []
    ways += [f"weights decoded to {decoded}"] if decoded != "float32" else []
    return Check(name, far <= limit, ", ".join([apart, f"{limit:.1e} allowed", *ways]))


def _reference(beside: Path, other: Path | None) -> tuple[Digest, QuantizedFolder | None]:
    """What an exported model is held against: the digest of another folder, or the one that lies beside it.

    Raises:
        CheckpointError: there is none.
    """
    digest = Digest.stored(other if other is not None else beside)
    if other is None:
        if digest is None:
            raise CheckpointError(
                f"{beside}: holds no {DIGEST} to hold its predictions against; name the folder that it was exported "
                "from: --against DIR"
            )
        return digest, None
    if loader.quant_method(other) == QUANT_METHOD:
        source = QuantizedFolder(other)
        if digest is None or digest.sensitivity is None:
            prompts = _prompts(source)
            digest = Digest.of(prompts, *_logits(partial(decoded_logits, source), prompts))
        return digest, source
    if digest is None:
        original = open_source(other)
        prompts = prompts_for(other, original.config.get_text_config().vocab_size)
        digest = Digest.of(prompts, *_logits(partial(original_logits, original), prompts))
    return digest, None


def _prompts(folder: QuantizedFolder) -> list[list[int]]:
    return prompts_for(folder.folder, folder.original_config().get_text_config().vocab_size)


def _logits(run: Callable[..., torch.Tensor], prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A model's logits, and those of the first prompt when its inputs are shaken."""
    logits = run([*prompts, prompts[0]], shaken=True)
    return logits[:-1], logits[-1]


@contextmanager
def _imported(path: Path) -> Iterator[tuple[Path, int]]:
    """A GGUF file as a folder for transformers, in float32 and gone afterwards; where memory is short, as it is cached.

    Also how many of its tensors are not what the codes meant.

    Raises:
        CheckpointError: it cannot be read.
    """
    weights, inexact = gguf_weights(path)
    if not loader.enough_memory(loader.bytes_of(weights, torch.float32)):
        yield cached_gguf(path), inexact
        return
    places = cache_dir() / "gguf"
    places.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=places) as folder:
        yield import_gguf(path, Path(folder) / path.stem, dtype=torch.float32), inexact


def _some(wrong: list[str]) -> str:
    return "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
