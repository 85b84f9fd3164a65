"""The tensors of a ``.gguf`` file as a Hugging Face checkpoint has them, by transformers' own names and layouts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import torch

from quantlab.checkpoint.gguf_file import INSTEAD, ROPE_FREQS, field, or_refuse
from quantlab.errors import CheckpointError

Progress = Callable[[int, int, str], None]
"""Called as ``progress(done, total, what)``: weights written, weights in all, the weight's name."""
_Convert = Callable[[str, dict[str, np.ndarray]], torch.Tensor]


def weights(
    path: Path, reader: gguf.GGUFReader, model: Any, progress: Progress | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every weight as a Hugging Face checkpoint has them, in the model's order.

    Args:
        path: of the file, for messages.
        reader: of the file.
        model: on the meta device.
        progress: told of each weight.

    Raises:
        CheckpointError: a tensor has no place in the model, a weight none to be made of, or they do not fit.
    """
    from transformers.core_model_loading import revert_weight_conversion

    sources, convert = _sources(path, reader, model)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    expected = {name: weight for name, weight in model.state_dict().items() if name in sources}
    for done, (name, weight) in enumerate(expected.items(), 1):
        with or_refuse(f"{path}: {name} cannot be made of {', '.join(sources[name])}"):
            stored = [tensors[source] for source in sources[name]]
            value = convert(name, {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in stored})
            if value.shape != weight.shape:
                raise ValueError(f"it has shape {list(value.shape)}, the model wants {list(weight.shape)}")
        # Checkpoints keep experts apart where the module holds them stacked; `save_pretrained` does the same.
        yield from revert_weight_conversion(model, {name: value.to(weight.dtype)}).items()
        if progress:
            progress(done, len(expected), name)


def _sources(path: Path, reader: gguf.GGUFReader, model: Any) -> tuple[dict[str, list[str]], _Convert]:
    """Which tensors make each weight, and how. Every tensor has a place, and every weight a source."""
    architecture, kind = field(reader, "general.architecture"), type(model).__name__
    names = [tensor.name for tensor in reader.tensors if tensor.name != ROPE_FREQS]
    with or_refuse(f"{path}: this transformers has no tensor names for architecture {architecture!r}"):
        from transformers.integrations.gguf import is_gguf_arch_supported as is_renamed

        read = _renamed if is_renamed(architecture) else _mapped
        targets, convert = read(architecture, model, names)
    tied, expected = model.all_tied_weights_keys, model.state_dict()
    sources: dict[str, list[str]] = {}
    for name, target in targets.items():
        if target in expected and target not in tied:
            sources.setdefault(target, []).append(name)
        elif target not in expected and not _matches(target, model._keys_to_ignore_on_load_unexpected):
            raise CheckpointError(f"{path}: tensor {name} has no place in {kind}; {INSTEAD}.")
    rebuilt = {n for n, _ in model.named_buffers() if _matches(n, model._keys_to_ignore_on_load_missing)}
    missing = sorted(expected.keys() - sources.keys() - tied.keys() - rebuilt)
    if missing:
        raise CheckpointError(f"{path}: no tensor for {missing[0]}, of {len(missing)} missing; {INSTEAD}.")
    return sources, convert


def _matches(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _mapped(architecture: str, model: Any, names: list[str]) -> tuple[dict[str, str], _Convert]:
    """Most architectures: transformers' name map and tensor processors (q/k rows, norms, experts)."""
    from transformers import modeling_gguf_pytorch_utils as loader

    processor = loader.TENSOR_PROCESSORS.get(architecture, loader.TensorProcessor)(model.config.to_dict())
    places = loader.get_gguf_hf_weights_map(model, processor)

    def convert(target: str, arrays: dict[str, np.ndarray]) -> torch.Tensor:
        done: dict[str, torch.Tensor] = {}
        for name, array in arrays.items():
            result = processor.process(
                weights=array, name=name, tensor_key_mapping=places, parsed_parameters={"tensors": done}
            )
            if result.name is not None:
                done[target] = _torch(result.weights)
                continue
            parts = [part for part, place in places.items() if place == target]  # stacked by the processor
            if missing := [part for part in parts if not any(have.startswith(part) for have in arrays)]:
                raise CheckpointError(f"{target}: {missing[0]} is not in the file; download it again.")
        return done[target]

    stacked = {name: places.get(name.removesuffix(".weight"), name) for name in names}
    return {name: places.get(name, stacked[name]) for name in names}, convert


def _renamed(architecture: str, model: Any, names: list[str]) -> tuple[dict[str, str], _Convert]:
    """The newest architectures: transformers' renamings and converters, as its own checkpoints go through."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.integrations.gguf import get_gguf_conversion_mapping

    mapping = get_gguf_conversion_mapping(architecture, model.config)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    context = (renamings, converters, model.base_model_prefix, model.state_dict())
    renamed = {name: rename_source_key(name, *context) for name in names}

    def convert(target: str, arrays: dict[str, np.ndarray]) -> torch.Tensor:
        patterns = {name: cast(str, renamed[name][1]) for name in arrays}
        first = next(iter(arrays))
        if patterns[first] is None:
            return _torch(arrays[first])
        converter = deepcopy(next(c for c in converters if patterns[first] in c.source_patterns))
        if missing := set(converter.source_patterns) - set(patterns.values()):
            raise CheckpointError(f"{target}: {min(missing)} is not in the file; download it again.")
        for name, array in arrays.items():
            converter.add_tensor(target, name, patterns[name], cast(Any, _torch(array)))
        result = converter.convert(target, model=model, config=model.config)[target]
        return result[0] if isinstance(result, list) else result

    return {name: target for name, (target, _) in renamed.items()}, convert


def _torch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
