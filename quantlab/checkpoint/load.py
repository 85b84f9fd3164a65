"""Loading a model, quantized or not, ready to run."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quantlab.checkpoint import plugin
from quantlab.checkpoint.resolve import resolve
from quantlab.errors import CheckpointError


def load(model: str | Path, **kwargs: Any) -> PreTrainedModel:
    """The model in a folder (quantized or not), a ``.gguf`` file, on the hub, or ``demo``; in eval mode.

    Args:
        model: what a person calls it.
        **kwargs: for ``from_pretrained``, for example ``dtype`` or ``device_map``. Under a device map, what has no room
            on a device comes when it is called: packed codes are buffers, so ``offload_buffers`` is true, and where
            none is given ``offload_folder`` is a temporary one that goes with the model.

    Raises:
        CheckpointError: there is no such model, or it cannot be loaded.
    """
    plugin.register()
    folder = resolve(model)
    if "device_map" not in kwargs:
        return _loaded(model, folder, kwargs)
    kwargs = {"offload_buffers": True, **kwargs}
    if kwargs.get("offload_folder") or not _may_offload(kwargs["device_map"]):
        return _loaded(model, folder, kwargs)
    # What transformers converts as it loads it (experts, fused) is written there; the rest is read where it lies.
    offloaded = tempfile.mkdtemp(prefix="quantlab-")
    try:
        loaded = _loaded(model, folder, {**kwargs, "offload_folder": offloaded})
    except BaseException:
        shutil.rmtree(offloaded, ignore_errors=True)
        raise
    weakref.finalize(loaded, shutil.rmtree, offloaded, ignore_errors=True)
    return loaded


def _loaded(model: str | Path, folder: Path, options: dict[str, Any]) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(folder)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        return (named or AutoModelForCausalLM).from_pretrained(folder, **{"dtype": "auto", **options}).eval()
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{model}: cannot be loaded: {error}") from error


def _may_offload(device_map: Any) -> bool:
    """Whether parts of a model may go to the disk: accelerate chooses, or somebody says so."""
    if isinstance(device_map, dict):
        return "disk" in device_map.values()
    return isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential")
