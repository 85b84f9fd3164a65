"""Speed and memory of a model on devices that are not here: the roofline, from its config and a recipe alone.

A device can do so many operations and read so many bytes a second; whichever takes longer is the time that it cannot go
below. Everything here is such a bound, computed and not measured. Formulas: arXiv:2405.08944, sections 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from quantlab.checkpoint.resolve import resolve
from quantlab.devices import Device, device_called
from quantlab.errors import QuantlabError
from quantlab.model_shape import Shape, model_shapes
from quantlab.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Prediction:
    """Bounds for one model on one device; a program is slower.

    Attributes:
        device: its name.
        model: ``original``, or the recipe's name.
        fits: whether weights and one context are smaller than the memory; the other figures do not ask.
        weight_bytes: in memory.
        kv_bytes: of one context.
        prefill_seconds: to read the prompt.
        step_seconds: to decode one token after it, alone.
        concurrency: contexts that are in memory at once.
        batch_tokens_per_second: of all of them together, when they decode at once; 0 if there is none.
        boundary_batch: how many tokens at once take as long to compute as the weights take to be read.
        switch_seconds: to send one context to the host's memory and fetch another; None on the host itself.
    """

    device: str
    model: str
    fits: bool
    weight_bytes: float
    kv_bytes: float
    prefill_seconds: float
    step_seconds: float
    concurrency: int
    batch_tokens_per_second: float
    boundary_batch: float
    switch_seconds: float | None

    @property
    def tokens_per_second(self) -> float:
        """One context, decoded alone."""
        return 1 / self.step_seconds


@dataclass(frozen=True)
class Roofline:
    """Predictions: ``predicted`` is always true, so that nobody takes the figures for measured ones.

    Attributes:
        model: what a person called it.
        tokens: of the context.
        devices: with the sources of their figures.
        shapes: the original's first.
        predictions: for each device, for each shape.
    """

    model: str
    tokens: int
    devices: tuple[Device, ...]
    shapes: tuple[Shape, ...]
    predictions: tuple[Prediction, ...]
    predicted: bool = field(default=True, init=False)

    def to_dict(self) -> dict[str, Any]:
        """A JSON mapping."""
        flat = asdict(self)
        for record, found in zip(flat["predictions"], self.predictions, strict=True):
            record["tokens_per_second"] = found.tokens_per_second
        for record, shape in zip(flat["shapes"], self.shapes, strict=True):
            kept = [layer for layer in shape.attention if layer.window is None]
            record["attention"] = {"layers": len(shape.attention), "without_window": len(kept)}
            record["kv_bytes_per_token"] = shape.kv_bytes(1)
        return flat


def predict(shape: Shape, device: Device, tokens: int) -> Prediction:
    """The roofline of a model on a device after a prompt of so many tokens."""
    context = shape.kv_bytes(tokens)
    concurrency = max(0, math.floor((device.memory - shape.bytes) / context)) if context else 0

    def step(batch: int) -> float:
        reading = (shape.read_bytes(batch) + batch * context) / device.bandwidth
        return max(reading, batch * shape.step_flops(tokens) / device.flops)

    return Prediction(
        device=device.name,
        model=shape.name,
        fits=shape.bytes + context <= device.memory,
        weight_bytes=shape.bytes,
        kv_bytes=context,
        prefill_seconds=max(shape.prefill_flops(tokens) / device.flops, shape.read_bytes(tokens) / device.bandwidth),
        step_seconds=step(1),
        concurrency=concurrency,
        batch_tokens_per_second=concurrency / step(concurrency) if concurrency else 0.0,
        boundary_batch=shape.read_bytes(1) / device.bandwidth * device.flops / (2 * shape.active_weights),
        switch_seconds=2 * context / device.link if device.link else None,
    )


def roofline(
    model: str | Path,
    recipe: str | Path | Recipe | None = None,
    devices: str | Device | Sequence[str | Device] = ("h100", "a100", "rtx4090", "cpu"),
    *,
    tokens: int = 4096,
    kv_bits: float | None = None,
    overrides: Iterable[str] = (),
) -> Roofline:
    """Predict latency and memory of a model as it is, and as a recipe would make it. Nothing is loaded or run.

    Args:
        model: a folder (its ``config.json`` is enough), a ``.gguf`` file, a Hugging Face id, or ``demo``.
        recipe: a ready recipe, a file, or a recipe; None: the original alone.
        devices: names, see :func:`quantlab.devices.device_called`; ``cpu`` is measured.
        tokens: of the context.
        kv_bits: of a number in the cache of keys and values; None: as many as the model's dtype has.
        overrides: changes of the recipe, ``key=value``.

    Raises:
        QuantlabError: no such model, recipe or device; a recipe that does not fit; an attention whose cache is not
            one of keys and values.
    """
    if type(tokens) is not int or tokens < 1:
        raise QuantlabError(f"tokens {tokens!r}: use a whole number, at least 1")
    if kv_bits is not None and not 0 < kv_bits <= 32:
        raise QuantlabError(f"kv_bits {kv_bits!r}: use the bits of a number in the cache, above 0 and up to 32")
    listed = [devices] if isinstance(devices, str | Device) else list(devices)
    known = tuple(device if isinstance(device, Device) else device_called(device) for device in listed)
    if not known:
        raise QuantlabError("no device to predict for; name one, for example h100")
    if recipe is not None and not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    shapes = model_shapes(resolve(model), recipe)
    if kv_bits is not None:
        shapes = tuple(replace(shape, kv_bits=kv_bits) for shape in shapes)
    predictions = tuple(predict(shape, device, tokens) for device in known for shape in shapes)
    return Roofline(str(model), tokens, known, shapes, predictions)
