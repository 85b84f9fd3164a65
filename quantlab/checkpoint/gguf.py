"""A ``.gguf`` file becomes a plain Hugging Face folder, one tensor at a time.

The names and layouts are those of transformers (``modeling_gguf_pytorch_utils`` for most architectures,
``integrations.gguf`` for the newest); its loader is not used, because it holds the whole model in memory. The
transformers internals are imported where they are used: a release that moves them breaks only this import.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from quantlab.checkpoint.cache import cache_dir
from quantlab.checkpoint.gguf_config import config_and_tokenizer, empty_model
from quantlab.checkpoint.gguf_file import existing_file, field, open_file
from quantlab.checkpoint.gguf_tensors import Progress, weights
from quantlab.checkpoint.quantized import INEXACT
from quantlab.errors import CheckpointError
from quantlab.storage import dtype_name

RECORD = "quantlab-import.json"


def cached_gguf(path: Path, *, dtype: torch.dtype = torch.bfloat16, progress: Progress | None = None) -> Path:
    """:func:`import_gguf` into the cache, in a folder of its own for each path, size, time of change and dtype."""
    path = existing_file(path)
    key = sha256(f"{path}\n{_record(path, dtype)}".encode()).hexdigest()[:12]
    return import_gguf(path, cache_dir() / "gguf" / f"{path.stem}-{key}", dtype=dtype, progress=progress)


def import_gguf(
    path: Path,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int = 1_000_000_000,
    progress: Progress | None = None,
) -> Path:
    """Write the model of a ``.gguf`` file as config, tokenizer and safetensors; return ``folder``.

    It takes the memory of one shard and of one weight in float32. A folder that an earlier import of the same file
    wrote is returned as it is. With tied embeddings the head is not written.

    Args:
        path: the file.
        folder: to write.
        dtype: of the model; a weight that the architecture itself declares in float32 stays so.
        max_shard_size: bytes.
        progress: told of each weight.

    Raises:
        CheckpointError: the file is cut short or not GGUF, transformers does not know the architecture, a tensor has no
            place in the model, or the model misses one. No folder is left.
    """
    path, folder = existing_file(path), Path(folder).absolute()
    record = _record(path, dtype)
    if _is_import_of(folder, record):
        return folder
    if folder.exists() and not (folder / RECORD).exists() and (folder.is_file() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and no GGUF import wrote it; remove it or choose another folder.")
    reader = open_file(path)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        config, tokenizer = config_and_tokenizer(path, reader)
        model = empty_model(path, config, dtype)
        _write_shards(partial, weights(path, reader, model, progress), max_shard_size)
        config.architectures, config.dtype = [type(model).__name__], dtype
        config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if model.can_generate():
            GenerationConfig.from_model_config(config).save_pretrained(partial)
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        if not _is_import_of(folder, record):  # another process may have finished meanwhile
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def gguf_weights(path: Path) -> tuple[int, int]:
    """How many weights a file holds, and how many of its tensors quantlab says to be inexact.

    Raises:
        CheckpointError: there is no such file, or it cannot be read.
    """
    reader = open_file(existing_file(path))
    return sum(int(tensor.n_elements) for tensor in reader.tensors), field(reader, f"quantlab.{INEXACT}", 0)


def _record(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "dtype": dtype_name(dtype)}


def _is_import_of(folder: Path, record: dict[str, Any]) -> bool:
    try:
        return json.loads((folder / RECORD).read_text()) == record
    except (OSError, ValueError):
        return False


def _write_shards(folder: Path, weights: Iterable[tuple[str, torch.Tensor]], max_shard_size: int) -> None:
    """Safetensors shards of at most ``max_shard_size`` bytes (one tensor at least), and an index if several."""
    shards: list[list[str]] = []
    sizes = [0]
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        save_file(shard, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in weights:
        if shard and sizes[-1] + tensor.nbytes > max_shard_size:
            flush()
            sizes.append(0)
        shard[name] = tensor.clone(memory_format=torch.contiguous_format)
        sizes[-1] += tensor.nbytes
    flush()
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for i, file in enumerate(files):
        (folder / f"{i}.safetensors").rename(folder / file)
    if len(shards) > 1:
        place = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(place.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
