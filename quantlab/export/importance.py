"""What the inputs of each layer make of its weights' errors: their second moment, seen on calibration data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from quantlab.checkpoint.load import load
from quantlab.checkpoint.quantized import QuantizedFolder
from quantlab.engine.calibration import prepare
from quantlab.engine.hooks import hooked
from quantlab.engine.quantize import RECIPE
from quantlab.engine.statistics import InputAccumulator
from quantlab.errors import CheckpointError
from quantlab.problem import Statistic
from quantlab.recipe import Calibration, load_recipe

MEASURE = "measure"


def importance_of(source: QuantizedFolder, choice: str | None, original: str | None) -> dict[str, torch.Tensor]:
    """The second moment ``[in]`` of each layer's inputs, by name; empty if there is none.

    Args:
        source: the model that is exported.
        choice: a safetensors file, ``measure``, or None.
        original: the model's folder before it was quantized, to be measured.

    Raises:
        CheckpointError: the file cannot be read, or there is no original to measure.
    """
    if choice is None:
        return {}
    if choice == MEASURE:
        if original is None:
            raise CheckpointError("--set importance=measure runs the original model; name it: --set original=MODEL")
        return measured(source, original)
    try:
        return load_file(Path(choice).expanduser())
    except Exception as error:  # safetensors raises an exception class of its own
        raise CheckpointError(
            f"--set importance={choice}: neither `measure` nor a readable safetensors file ({error})"
        ) from error


def check_untransformed(source: QuantizedFolder) -> None:
    """Refuse to take an original's weights or inputs for a model that was rewritten before it was quantized.

    Raises:
        CheckpointError: names the transform.
    """
    recipe = source.folder / RECIPE
    transforms = load_recipe(str(recipe)).transforms if recipe.is_file() else {}
    if transforms:
        raise CheckpointError(
            f"--set original: {source.folder} was rewritten by {' and '.join(transforms)} before it was quantized, and "
            "the original's weights do not fit between its norms; leave it out, or quantize without transforms"
        )


@torch.no_grad()
def measured(source: QuantizedFolder, original: str) -> dict[str, torch.Tensor]:
    """Run the original, whole in memory, over the calibration data of the folder's recipe."""
    check_untransformed(source)
    recipe = source.folder / RECIPE
    choice = load_recipe(str(recipe)).calibration if recipe.is_file() else Calibration()
    model = load(original)
    tokenizer = AutoTokenizer.from_pretrained(source.folder, local_files_only=True)
    seen: dict[str, InputAccumulator] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if inputs[0].is_floating_point():  # an embedding is handed ids
                seen[name].add(inputs[0])

        return add

    for name, storage in source.layers.items():
        seen[name] = InputAccumulator(Statistic.DIAGONAL, storage.in_features)
    with hooked(model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in seen):
        for batch in prepare(choice, tokenizer, model.config).batches():
            model(input_ids=batch, use_cache=False)
    moments = {name: found.finish().diagonal for name, found in seen.items() if found.tokens}
    return {name: moment for name, moment in moments.items() if moment is not None}
