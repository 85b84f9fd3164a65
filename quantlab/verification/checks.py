"""What can be checked of a quantized folder without running it: its tensors, and that they are what the recipe said."""

from __future__ import annotations

from pathlib import Path

from quantlab.checkpoint.quantized import QuantizedFolder
from quantlab.engine import preflight
from quantlab.engine.architecture import describe
from quantlab.engine.quantize import RECIPE
from quantlab.errors import QuantlabError
from quantlab.export.base import fused_sets
from quantlab.numerics import all_finite, decode_scales, scale_type
from quantlab.recipe import Recipe, Scheme, load_recipe
from quantlab.storage import Storage


def unsound_tensors(folder: QuantizedFolder) -> list[str]:
    """What is wrong with tensors: numbers that are none, codes without a value, shapes unlike config.json's."""
    wrong = []
    for name in folder.layers:
        try:
            qtensor = folder.layer(name)
        except QuantlabError as error:
            wrong.append(str(error))
            continue
        scales = decode_scales(qtensor.scales, qtensor.outer)
        repair = qtensor.low_rank
        parts = [scales] if repair is None else [scales, repair.scaled_left(), repair.right]
        if not all(map(all_finite, parts)):
            wrong.append(f"{name}: has scales or corrections that are no numbers")
        elif not bool(scales.all()):
            wrong.append(f"{name}: has scales that are 0")
    odd = (name for name in folder.kept if not all_finite(folder.files.read(name)))
    return wrong + [f"{name}: holds numbers that are none (NaN or infinity)" for name in odd]


def unlike_recipe(folder: QuantizedFolder) -> list[str] | None:
    """Layers that are not stored as the folder's recipe says, each with the difference; None without a recipe."""
    path = Path(folder.folder) / RECIPE
    if not path.is_file():
        return None
    recipe: Recipe = load_recipe(str(path))
    skeleton = folder.skeleton()
    planned = preflight.plan(recipe, describe(skeleton), skeleton)
    wrong = [f"{name}: the recipe quantizes it, the folder does not" for name in planned if name not in folder.layers]
    for name, storage in folder.layers.items():
        if name not in planned:
            wrong.append(f"{name}: is quantized, which the recipe does not say")
        elif difference := _difference(storage, planned[name].scheme):
            wrong.append(f"{name}: {difference}")
    return wrong


def _difference(storage: Storage, scheme: Scheme) -> str:
    """What of a stored layer is not what its scheme says; empty if nothing."""
    known = scheme.known_format
    assert known is not None  # layers that stay as they are are in no plan
    groups = {"channel": 1, "tensor": 1}.get(str(scheme.granularity))
    groups = groups or storage.in_features // int(scheme.granularity)
    rows = 1 if scheme.granularity == "tensor" else storage.out_features
    expected = {
        "bits": (storage.bits, known.bits),
        "format": (storage.format, known.name if known.grid is not None else storage.format),
        "scales": (storage.scale_shape, (rows, groups)),
        "scale_dtype": (storage.scale_dtype, str(scale_type(scheme.scale_dtype).dtype).removeprefix("torch.")),
        "symmetric": (storage.zero_dtype is None, scheme.symmetric),
        "activations": (storage.activations, scheme.activations),
    }
    for what, (found, said) in expected.items():
        if found != said and not (what == "symmetric" and said):  # some methods choose zeros of their own
            return f"{what} {found}, where the recipe says {said}"
    return ""


def differing_sets(folder: QuantizedFolder) -> list[str]:
    """Sets of layers that servers fuse (q/k/v, gate/up) and that are not stored alike."""
    differing = []
    for members in fused_sets(folder.layers):
        kinds = set()
        for name in members:
            storage = folder.layers[name]
            family = storage.format.partition(":")[0]  # fitted tables differ from layer to layer
            size = storage.in_features // storage.scale_shape[1]
            kinds.add((family, size, storage.scale_dtype, storage.activations))
        if len(kinds) > 1:
            differing.append("/".join([members[0], *(name.rpartition(".")[2] for name in members[1:])]))
    return differing
