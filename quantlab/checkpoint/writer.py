"""Writing a model folder, shard by shard: each file appears whole or not at all, and config.json last."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from quantlab.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_PARTIAL = ".partial"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
# What a model folder has beside its weights and config.json.
_ASSETS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
)


def shard_name(index: int, total: int) -> str:
    """The file name of shard ``index`` (from 1) of ``total``, as Hugging Face has it."""
    return "model.safetensors" if total == 1 else f"model-{index:05d}-of-{total:05d}.safetensors"


def weight_bytes(folder: Path) -> int:
    """Of all weight files of a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


class CheckpointWriter:
    """A model folder in the making.

    What an interrupted run left half-written is removed at the start; shards that it finished stay, and
    :meth:`has` tells.

    Raises:
        CheckpointError: there cannot be such a folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be made a folder ({error})") from error
        for leftover in self.folder.glob(f"*{_PARTIAL}"):
            leftover.unlink()

    def has(self, shard: str) -> bool:
        """Whether the shard is written, completely."""
        return (self.folder / shard).is_file()

    def read(self, shard: str) -> dict[str, torch.Tensor]:
        """The shard's tensors.

        Raises:
            CheckpointError: it is not there, or cannot be read.
        """
        try:
            return load_file(self.folder / shard)
        except Exception as error:  # safetensors raises an exception class of its own
            raise CheckpointError(
                f"{self.folder / shard}: cannot be read ({error}); remove it and run again"
            ) from error

    def write(self, shard: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one safetensors file. Equal tensors give equal bytes; views are written out.

        Raises:
            CheckpointError: the disk is full, or the folder cannot be written.
        """
        plain = _separate({name: tensors[name] for name in sorted(tensors)})
        self._atomically(shard, lambda path: save_file(plain, path, metadata={"format": "pt"}))

    def finish(
        self,
        config: PretrainedConfig | Mapping[str, Any],
        quantization_config: Mapping[str, Any] | None,
        assets_from: Path | None,
    ) -> None:
        """Write the index, copy tokenizer and other assets, and at last write config.json.

        Raises:
            CheckpointError: a shard is missing, or two hold the same tensor.
        """
        shards = self._shards()
        headers = {shard: read_header(self.folder / shard)[0] for shard in shards}
        if shards != ["model.safetensors"]:
            self.write_json(INDEX, _index(headers))
        if assets_from is not None:
            for pattern in _ASSETS:
                for file in sorted(Path(assets_from).glob(pattern)):
                    self._copy(file, file.relative_to(assets_from))
        described = json.loads(config.to_json_string()) if isinstance(config, PretrainedConfig) else dict(config)
        described.pop("_name_or_path", None)
        if quantization_config is not None:
            described["quantization_config"] = dict(quantization_config)
        self.write_json("config.json", described)

    def _shards(self) -> list[str]:
        numbered = {file.name: _SHARD.fullmatch(file.name) for file in self.folder.glob("model*.safetensors")}
        shards = sorted(numbered)
        if shards == ["model.safetensors"]:
            return shards
        totals = {match[2] for match in numbered.values() if match}
        if len(totals) != 1 or None in numbered.values():
            raise CheckpointError(
                f"{self.folder}: {shards or 'no shards'} are not the shards of one model; remove them"
            )
        total = int(totals.pop())
        if missing := [name for i in range(total) if (name := shard_name(i + 1, total)) not in numbered]:
            raise CheckpointError(f"{self.folder}: shards are missing: {', '.join(missing)}")
        return shards

    def _copy(self, file: Path, to: Path) -> None:
        if file.is_file():
            (self.folder / to).parent.mkdir(exist_ok=True)
            self._atomically(str(to), lambda path: shutil.copyfile(file, path))

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write one JSON file.

        Raises:
            CheckpointError: the disk is full, or the folder cannot be written.
        """
        text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        self._atomically(name, lambda path: path.write_text(text, encoding="utf-8"))

    def _atomically(self, name: str, write: Callable[[Path], object]) -> None:
        target = self.folder / name
        partial = self.folder / f"{Path(name).name}{_PARTIAL}"
        try:
            write(partial)
            _sync(partial)
            os.replace(partial, target)
            _sync(target.parent)
        except Exception as error:
            partial.unlink(missing_ok=True)
            raise CheckpointError(f"{target}: cannot be written: {error}") from error


def read_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """What a safetensors file says of its tensors, and where in the file their data starts.

    Returns:
        ``dtype``, ``shape`` and ``data_offsets`` (from the start of the data) by name, and that start.

    Raises:
        CheckpointError: not a safetensors file, or cut short.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
    if 8 + length + end != size:
        raise CheckpointError(f"{file}: has {size} bytes, its header speaks of {8 + length + end}; download it again")
    return header, 8 + length


def _index(headers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    weight_map: dict[str, str] = {}
    total = 0
    for shard, header in headers.items():
        for name, entry in header.items():
            if name in weight_map:
                raise CheckpointError(
                    f"{name}: is in {weight_map[name]} and in {shard}; remove the folder and run again"
                )
            weight_map[name] = shard
            total += entry["data_offsets"][1] - entry["data_offsets"][0]
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors on the CPU that share no memory: what safetensors wants."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        if address in seen:
            plain = plain.clone()
        seen.add(address)
        separate[name] = plain
    return separate


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
