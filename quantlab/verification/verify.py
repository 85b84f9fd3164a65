"""The checks, one after another, of a folder that quantlab wrote or of what was exported from it.

What the folder *means* is computed twice, by ways that share nothing but the files: here its codes are decoded one
module at a time and run through transformers' own layers in float32; and a fresh process loads it as its users do. The
first is kept beside the model as a digest, which later checks, and those of exported files, are held against.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from quantlab.checkpoint.gguf import cached_gguf
from quantlab.checkpoint.native import QUANT_METHOD
from quantlab.checkpoint.quantized import DIGEST, QuantizedFolder
from quantlab.checkpoint.resolve import resolve
from quantlab.checkpoint.source import open_source
from quantlab.checkpoint.writer import CheckpointWriter, weight_bytes
from quantlab.errors import CheckpointError
from quantlab.export.compressed_tensors import rounds_inputs
from quantlab.verification import checks
from quantlab.verification.digest import Digest, prompts_for
from quantlab.verification.streamed import decoded_logits, original_logits

# Mean divergence, nats a position, up to which two ways of running the same weights count as one: float32 throughout,
# or one of them in the model's 16-bit dtype.
_SAME = {"float32": 1e-5, "auto": 2e-2}
# Where inputs are rounded to 8 bits, sums that differ in their last digit put some inputs on the other side of a step,
# and the model's later layers have more of that: two ways are as far apart as rounding is from not rounding.
_SAME_ROUNDED = 1e-1
_SECONDS = 1800


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
        found = _load_checks(cached_gguf(path), "auto", _digest_of(path.parent, other), "this package's GGUF reader")
        return Verification(path, tuple(found))
    stored = _quantization_config(path)
    if stored.get("quant_method") != QUANT_METHOD:
        found = _load_checks(path, "auto", _digest_of(path, other), "transformers", rounds=rounds_inputs(stored))
        return Verification(path, tuple(found))
    folder = QuantizedFolder(path)
    found = _static_checks(folder)
    digest = Digest.stored(path)
    prompts = digest.prompts if digest else prompts_for(path, folder.original_config().get_text_config().vocab_size)
    try:
        logits = decoded_logits(folder, prompts)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:  # a decoder's own ids, a picture
        reason = " ".join(str(error).split())
        return Verification(path, (*found, Check("predictions", None, f"it does not run on token ids alone: {reason}")))
    found.append(Check("predictions are numbers", bool(logits.isfinite().all())))
    if not found[-1].passed:
        return Verification(path, tuple(found))
    now = Digest.of(prompts, logits)
    if digest is None:
        CheckpointWriter(path).write_json(DIGEST, now.to_dict())
    else:
        found.append(_stored_check(digest, logits))
    if other is not None:
        far = now.divergence(_gathered(now, original_logits(open_source(other), prompts)))
        found.append(Check("distance from the original", None, f"{far:.4f} nats a token"))
    found += _load_checks(path, "float32", now, "transformers with quantlab", rounds=folder.rounds_inputs)
    return Verification(path, tuple(found))


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


def _stored_check(digest: Digest, logits: torch.Tensor) -> Check:
    far = digest.divergence(_gathered(digest, logits))
    return Check("predictions are those of the stored digest", far <= _SAME["float32"], f"{far:.1e} nats a token")


def _gathered(digest: Digest, logits: torch.Tensor) -> list[list[list[float]]]:
    """What these logits give the digest's tokens: log-probabilities."""
    return logits.float().log_softmax(-1).gather(-1, torch.tensor(digest.tokens)).tolist()


def _load_checks(folder: Path, dtype: str, digest: Digest, loader: str, *, rounds: bool = False) -> list[Check]:
    """Load the folder in a process of its own and hold its predictions against a digest.

    Args:
        folder: what is loaded.
        dtype: what for: ``"float32"``, or ``"auto"``, the model's own.
        digest: what is expected of it.
        loader: what loads it, in words.
        rounds: whether the model rounds its inputs to 8 bits.
    """
    name = f"{loader} loads it, in a process of its own"
    needed, free = _bytes_needed(folder), psutil.virtual_memory().available
    if needed > free:
        return [Check(name, None, f"not tried: it takes about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")]
    answer = _asked(folder, dtype, digest)
    if "missing" in answer:
        return [Check(name, None, f"not tried: {answer['missing']}")]
    if "error" in answer:
        return [Check(name, False, answer["error"])]
    odd = "; ".join(f"{key}: {', '.join(names)}" for key, names in answer["odd"].items())
    found = [Check(name, not odd, odd)]
    if answer["tied"] is not None:
        said = "tied" if answer["ties"] else "not tied"
        found.append(Check("head and embedding are what config.json says", answer["tied"] == answer["ties"], said))
    far = digest.divergence(answer["logprobs"])
    limit = _SAME_ROUNDED if rounds else _SAME[dtype]
    found.append(
        Check(
            "its predictions are those of the codes", far <= limit, f"{far:.1e} nats a token apart, {limit:g} allowed"
        )
    )
    return found


def _asked(folder: Path, dtype: str, digest: Digest) -> dict[str, Any]:
    ours = _quant_method(folder) == QUANT_METHOD
    program = Path(__file__).with_name("fresh.py")
    command = [sys.executable, str(program), str(folder), dtype, str(int(ours))]
    try:
        done = subprocess.run(
            command, input=json.dumps(digest.to_dict()), capture_output=True, text=True, check=False, timeout=_SECONDS
        )
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {_SECONDS} seconds"}
    except (IndexError, ValueError):
        return {"error": f"the process ended with code {done.returncode}: {' '.join(done.stderr.split())[-400:]}"}


def _digest_of(beside: Path, other: Path | None) -> Digest:
    """What an exported model is held against: the digest of another folder, or the one that lies beside it."""
    digest = Digest.stored(other if other is not None else beside)
    if digest is None and other is not None and _quant_method(other) == QUANT_METHOD:
        folder = QuantizedFolder(other)
        prompts = prompts_for(other, folder.original_config().get_text_config().vocab_size)
        digest = Digest.of(prompts, decoded_logits(folder, prompts))
    elif digest is None and other is not None:
        source = open_source(other)
        prompts = prompts_for(other, source.config.get_text_config().vocab_size)
        digest = Digest.of(prompts, original_logits(source, prompts))
    if digest is None:
        raise CheckpointError(
            f"{beside}: holds no {DIGEST} to hold its predictions against; name the folder that it was exported from: "
            "--against DIR"
        )
    return digest


def _quant_method(folder: Path) -> str | None:
    return _quantization_config(folder).get("quant_method")


def _quantization_config(folder: Path) -> dict[str, Any]:
    """What a model's config.json says of its quantization; nothing if it is not quantized."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: has no readable config.json ({error})") from error
    return config.get("quantization_config") or {}


def _bytes_needed(folder: Path) -> int:
    """A guess of what loading takes: other formats' layers are decoded by transformers when they first run."""
    stored = weight_bytes(folder)
    return int(stored * (1.3 if _quant_method(folder) in (QUANT_METHOD, None) else 5)) + (1 << 29)


def _some(wrong: list[str]) -> str:
    return "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
