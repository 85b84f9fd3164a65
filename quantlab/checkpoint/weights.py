"""The weights of a Hugging Face folder, one tensor at a time, and transformers' way from file to model.

Checkpoints do not always hold a model's tensors as the model has them: transformers renames keys, stacks
experts, splits fused projections. :class:`WeightPlan` asks transformers once which keys of the files make
which tensors of the model, so that any of them can be had later by reading just those keys.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from quantlab.checkpoint.buffers import Buffers
from quantlab.checkpoint.writer import read_header
from quantlab.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What the system is asked to read ahead at once: no more than the smallest read-ahead of usual disks.
_PIECE = 1 << 19
_SAFETENSORS, _BIN = "model.safetensors", "pytorch_model.bin"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: what its header says."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0  # in a safetensors file

    @property
    def bytes(self) -> int:
        """What it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFiles:
    """The tensors in the weight files of a folder, by their names there; read only when asked for.

    Raises:
        CheckpointError: no weights, a shard is missing, or a file is cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.files = _weight_files(folder)
        self.stored: dict[str, StoredTensor] = {}
        self._bin: dict[str, torch.Tensor] = {}  # mapped, not read
        self._buffers: Buffers | None = None
        for file in self.files:
            if file.suffix == ".bin":
                state = _load_bin(file)
                self._bin |= state
                self.stored |= {name: StoredTensor(file, t.dtype, tuple(t.shape)) for name, t in state.items()}
            else:
                self.stored |= _entries(file)
        _check_index(folder, self.stored)

    def read(self, name: str) -> torch.Tensor:
        """The tensor as it is stored, on the CPU, in memory of its own.

        Files are read, not mapped: mapped pages would count as this process's memory for as long as it runs.
        """
        if name in self._bin:
            return self._bin[name].clone()
        stored = self.stored[name]
        data = (
            torch.empty(stored.bytes, dtype=torch.uint8) if self._buffers is None else self._buffers.take(stored.bytes)
        )
        buffer: Any = data.numpy()
        with open(stored.file, "rb", buffering=0) as stream:
            stream.seek(stored.offset)
            done = 0
            while done < len(data):
                count = stream.readinto(memoryview(buffer)[done:])
                if not count:
                    raise CheckpointError(f"{stored.file}: ends within {name}; it changed while it was read")
                done += count
        return data.view(stored.dtype).view(stored.shape)

    @contextlib.contextmanager
    def memory_reused(self) -> Iterator[None]:
        """Within this, memory that tensors were read into is kept, and read into again once nobody uses it."""
        self._buffers = Buffers()
        try:
            yield
        finally:
            self._buffers = None

    def expect(self, name: str) -> None:
        """Have a tensor fetched into the system's cache while others are at work; that is no memory of ours."""
        if name not in self._bin and hasattr(os, "posix_fadvise"):
            _ahead().submit(_fetch, self.stored[name])


@cache
def _ahead() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "quantlab-read-ahead")


def _fetch(stored: StoredTensor) -> None:
    """Ask for a tensor piece by piece: of a longer range Linux reads no more than a disk's read-ahead."""
    # What is wrong with the file is said when it is read for good.
    with contextlib.suppress(OSError), open(stored.file, "rb", buffering=0) as stream:
        for start in range(stored.offset, stored.offset + stored.bytes, _PIECE):
            os.posix_fadvise(stream.fileno(), start, _PIECE, os.POSIX_FADV_WILLNEED)


def _weight_files(folder: Path) -> list[Path]:
    for name in (_SAFETENSORS, _BIN):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(_weight_map(index).values()))
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise CheckpointError(f"{folder}: {index.name} names files that are not there: {', '.join(missing)}")
            return [folder / shard for shard in shards]
    raise CheckpointError(
        f"{folder}: has no weights; expected {_SAFETENSORS}, {_SAFETENSORS}.index.json with shards, or {_BIN}"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Which file has each tensor, as an index says; only files beside it.

    Raises:
        CheckpointError: it cannot be read, or names a path that leaves its folder.
    """
    try:
        places = {
            str(name): str(file) for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a readable index ({error})") from error
    for file in set(places.values()):
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(f"{index}: names {file!r}, which lies outside of its folder; do not trust this model")
    return places


def _check_index(folder: Path, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse files that an index speaks of otherwise than they are."""
    for name in (_SAFETENSORS, _BIN):
        if (folder / name).is_file():
            return
        index = folder / f"{name}.index.json"
        if index.is_file():
            places = _weight_map(index)
            wrong = [key for key, file in places.items() if key not in stored or stored[key].file != folder / file]
            if wrong:
                raise CheckpointError(
                    f"{index}: says that {places[wrong[0]]} has {wrong[0]}, which it has not; download the model again"
                )
            return


def _entries(file: Path) -> dict[str, StoredTensor]:
    entries = {}
    header, start = read_header(file)
    for name, entry in header.items():
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(f"{file}: {name} has the dtype {entry['dtype']}, which is not supported")
        begin, end = entry["data_offsets"]
        if begin < 0 or end - begin != math.prod(entry["shape"]) * dtype.itemsize or min(entry["shape"], default=0) < 0:
            raise CheckpointError(
                f"{file}: {name} is said to be {entry['dtype']} {entry['shape']} in the bytes {begin} to {end}, which "
                "cannot be; download the file again"
            )
        offset = start + begin
        entries[name] = StoredTensor(file, dtype, tuple(entry["shape"]), offset)
    return entries


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    try:
        # The format before torch 1.6 is no zip file and cannot be mapped.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # pickle, zip and torch each have their own
        raise CheckpointError(f"{file}: cannot be read as plain tensors ({error})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: holds a {type(state).__name__}, not tensors by name")
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


@dataclass
class _Recipe:
    """How one or several tensors of the model are made: keys of the files, and a conversion or None."""

    first: str
    converter: WeightConverter | None
    sources: list[tuple[str, str]] = field(default_factory=list)  # (pattern, key)


class WeightPlan:
    """Which keys of the files make which tensors of a model.

    Args:
        model: on the meta device, as transformers builds it.
        files: the weights.
        dtype: in which the model is to be.

    Attributes:
        targets: the model's tensors, empty, by name.
        untied: weights that the config ties but that the files hold twice with different values: transformers
            does not tie them.

    Raises:
        CheckpointError: a tensor in the files has another shape than the model's.
    """

    def __init__(self, model: PreTrainedModel, files: WeightFiles, dtype: torch.dtype) -> None:
        self.model = model
        self.files = files
        self.targets: dict[str, torch.Tensor] = dict(model.state_dict())
        self._dtypes = _target_dtypes(model, self.targets, dtype)
        self._recipes = self._planned()
        self.untied = self._stored_differently()

    def __contains__(self, target: str) -> bool:
        return target in self._recipes

    def read(self, target: str) -> dict[str, torch.Tensor]:
        """The tensor ``target`` of the model, and those that are made together with it.

        Raises:
            CheckpointError: the files' tensors cannot be converted, or have another shape than the model's.
        """
        recipe = self._recipes[target]
        if recipe.converter is None:
            made = {target: self._source(recipe.sources[0][1], target)}
        else:
            made = self._converted(recipe, recipe.converter)
        for name, value in made.items():
            self._check_shape(name, tuple(value.shape))
        return made

    def expect(self, target: str) -> None:
        """Say that ``target`` will be read soon."""
        for _, key in self._recipes[target].sources:
            self.files.expect(key)

    def _converted(self, recipe: _Recipe, template: WeightConverter) -> dict[str, torch.Tensor]:
        converter = deepcopy(template)
        for pattern, key in recipe.sources:
            read: Any = partial(self._source, key, recipe.first)  # transformers calls it when it converts
            converter.add_tensor(recipe.first, key, pattern, read)
        try:
            made = converter.convert(recipe.first, model=self.model, config=self.model.config)
        except Exception as error:  # whatever transformers' operations raise on tensors that do not fit
            keys = ", ".join(key for _, key in recipe.sources[:4])
            raise CheckpointError(f"{recipe.first}: cannot be made from {keys}, ... ({error})") from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _source(self, key: str, target: str) -> torch.Tensor:
        self._check_dtype(key, target)
        return self.files.read(key).to(self._dtypes[target])

    def _planned(self) -> dict[str, _Recipe]:
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = self.model.base_model_prefix
        recipes: dict[str, _Recipe] = {}
        for key in sorted(self.files.stored, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, self.targets)
            if target not in self.targets and key in self.targets:
                target, pattern = rename_source_key(key, [], [], prefix, self.targets)
            if target not in self.targets:
                continue  # the model has no such tensor; transformers ignores it too
            converter = by_pattern[pattern] if pattern is not None else None
            recipe = recipes.setdefault(target, _Recipe(target, converter))
            recipe.sources.append((pattern or key, key))
            self._check_dtype(key, target)
            if converter is None:
                self._check_shape(target, self.files.stored[key].shape)
        for recipe in list(recipes.values()):
            if recipe.converter is not None:  # one recipe may make several tensors
                names = recipe.converter.target_patterns
                recipes |= {recipe.first.replace(names[0], name): recipe for name in names}
        return recipes

    def _stored_differently(self) -> list[str]:
        """Tied weights that the files hold twice, with different values."""
        ties = self.model.all_tied_weights_keys.items()
        twice = [(target, origin) for target, origin in ties if target in self and origin in self]
        return [
            target for target, origin in twice if not torch.equal(self.read(target)[target], self.read(origin)[origin])
        ]

    def _check_dtype(self, key: str, target: str) -> None:
        """Refuse whole numbers, and 8-bit ones that want scales, where the model has floating-point weights."""
        found, wanted = self.files.stored[key].dtype, self._dtypes.get(target)
        if wanted is not None and wanted.is_floating_point and (not found.is_floating_point or found.itemsize < 2):
            raise CheckpointError(
                f"{key}: is stored as {found}, the model wants {wanted}; the file is damaged, or quantized by a tool "
                "that left no word of it in config.json"
            )

    def _check_shape(self, target: str, shape: tuple[int, ...]) -> None:
        expected = tuple(self.targets[target].shape) if target in self.targets else shape
        if shape != expected:
            raise CheckpointError(
                f"{target}: the weights have shape {list(shape)}, config.json makes a model with "
                f"{list(expected)}; the two do not belong together"
            )


def _target_dtypes(
    model: PreTrainedModel, targets: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """The dtype that from_pretrained gives each tensor: some modules of some models insist on float32."""
    kept = model._get_dtype_plan(dtype)
    if not kept:
        return {name: tensor.dtype for name, tensor in targets.items()}
    pattern, by_group, _ = build_glob_alternation(list(kept))
    dtypes = {}
    for name, tensor in targets.items():
        match = re.search(pattern, name)
        dtypes[name] = tensor.dtype if match is None else kept[by_group[str(match.lastgroup)]]
    return dtypes
