"""Loading a model, quantized or not, ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
            on a device comes when it is called: packed codes are buffers, so ``offload_buffers`` is true.

    Raises:
        CheckpointError: there is no such model, or it cannot be loaded.
    """
    plugin.register()
    folder = resolve(model)
    if "device_map" in kwargs:
        kwargs = {"offload_buffers": True, **kwargs}
    try:
        config = AutoConfig.from_pretrained(folder)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        return (named or AutoModelForCausalLM).from_pretrained(folder, **{"dtype": "auto", **kwargs}).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{model}: cannot be loaded: {error}") from error
