"""A `.gguf` file becomes a plain Hugging Face folder, one tensor at a time.

The names and layouts are those of transformers (`modeling_gguf_pytorch_utils` for most architectures,
`integrations.gguf` for the newest); its loader is not used, because it holds the whole model in memory. The
transformers internals are imported where they are used: a release that moves them breaks only this import.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from quantlab.checkpoint.quantized import INEXACT
from quantlab.errors import CheckpointError

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, what)`: weights written, weights in all, the weight's name."""
_Convert = Callable[[str, dict[str, np.ndarray]], torch.Tensor]

RECORD = "quantlab-import.json"
_ROPE_FREQS = "rope_freqs.weight"
_INSTEAD = "use the model's Hugging Face folder instead"
# llama.cpp's pre-tokenizers that cut numbers into single digits; transformers 5.23 has no entry for them.
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
# What transformers 5.23 leaves at its default for some mixtures of experts, and where the file says it.
_EXPERT_SIZES = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}


def cache_dir() -> Path:
    """Where quantlab keeps what it can make again: `$QUANTLAB_CACHE`, or the user's cache folder."""
    if chosen := os.environ.get("QUANTLAB_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "quantlab"


def cached_gguf(path: Path, *, dtype: torch.dtype = torch.bfloat16, progress: Progress | None = None) -> Path:
    """`import_gguf` into the cache, in a folder of its own for each path, size, time of change and dtype."""
    path = _existing(path)
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
    """Write the model of a `.gguf` file as config, tokenizer and safetensors; return `folder`.

    Memory: one shard (`max_shard_size` bytes) and one weight in float32. A folder that an earlier import of
    the same file wrote is returned as it is. `dtype` is the model's; a weight that the architecture itself
    declares in float32 stays so. With tied embeddings the head is not written.

    Raises CheckpointError, leaving no folder, when the file is cut short or not GGUF, when transformers does
    not know the architecture, when a tensor has no place in the model, or when the model misses one.
    """
    path, folder = _existing(path), Path(folder).absolute()
    record = _record(path, dtype)
    if _is_import_of(folder, record):
        return folder
    if folder.exists() and not (folder / RECORD).exists() and (folder.is_file() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and no GGUF import wrote it; remove it or choose another folder.")
    reader = _open(path)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        config, tokenizer = _config_and_tokenizer(path, reader)
        model = _empty_model(path, config, dtype)
        _write_shards(partial, _weights(path, reader, model, progress), max_shard_size)
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
    reader = _open(_existing(path))
    return sum(int(tensor.n_elements) for tensor in reader.tensors), _field(reader, f"quantlab.{INEXACT}", 0)


def _existing(path: Path) -> Path:
    path = Path(path).expanduser().resolve()
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a .gguf file.")
    return path


def _record(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "dtype": str(dtype).removeprefix("torch.")}


def _is_import_of(folder: Path, record: dict[str, Any]) -> bool:
    try:
        return json.loads((folder / RECORD).read_text()) == record
    except (OSError, ValueError):
        return False


@contextmanager
def _or_refuse(what: str, remedy: str = _INSTEAD) -> Iterator[None]:
    """Turn whatever a reader throws at a file that it does not expect into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what} ({type(error).__name__}: {error}); {remedy}.") from error


def _open(path: Path) -> gguf.GGUFReader:
    size = path.stat().st_size
    with _or_refuse(f"{path}: {size} bytes, not a complete GGUF file", "download it again"):
        reader = gguf.GGUFReader(path)
        if _field(reader, "general.architecture") is None:
            raise ValueError("no general.architecture in it")
    if (parts := _field(reader, "split.count", 1)) > 1:
        raise CheckpointError(f"{path}: one of {parts} parts; first merge them: `llama-gguf-split --merge`.")
    return reader


def _field(reader: gguf.GGUFReader, name: str, default: Any = None) -> Any:
    field = reader.get_field(name)
    return default if field is None else field.contents()


def _config_and_tokenizer(path: Path, reader: gguf.GGUFReader) -> tuple[Any, Any]:
    """The two as transformers reads them, with what it drops put back: expert sizes, digits, rope scaling."""
    from tokenizers import pre_tokenizers

    architecture, pre = _field(reader, "general.architecture"), _field(reader, "tokenizer.ggml.pre")
    vocabulary, release = _field(reader, "tokenizer.ggml.model"), f"transformers {transformers.__version__}"
    with tempfile.TemporaryDirectory() as alone:  # a config.json beside the file would be read in its place
        try:
            os.symlink(path, Path(alone) / "model.gguf")
            where, name = alone, "model.gguf"
        except OSError:  # a system without links
            where, name = str(path.parent), path.name
        with _or_refuse(f"{path}: {release} cannot read architecture {architecture!r}"):
            config = AutoConfig.from_pretrained(where, gguf_file=name)
        with _or_refuse(f"{path}: {release} cannot read its tokenizer, of type {vocabulary!r}"):
            tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    if pre in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    text = config.get_text_config()
    for attribute, key in _EXPERT_SIZES.items():
        if hasattr(text, attribute):
            setattr(text, attribute, _field(reader, f"{architecture}.{key}", getattr(text, attribute)))
    _complete_attention(text, reader, architecture)
    if _field(reader, "tokenizer.ggml.padding_token_id") is None:  # the class's default is another model's
        text.pad_token_id = None
    tokenizer.model_max_length = getattr(text, "max_position_embeddings", tokenizer.model_max_length)
    _restore_rope_scaling(path, reader, text, architecture)
    return config, tokenizer


def _complete_attention(config: Any, reader: gguf.GGUFReader, architecture: str) -> None:
    """What transformers' table of keys leaves at its default, and llama.cpp derives from the file."""
    for attribute, bias in (("attention_bias", "attn_q.bias"), ("mlp_bias", "ffn_down.bias")):
        if hasattr(config, attribute):  # which no key says: the tensors do
            setattr(config, attribute, any(tensor.name.endswith(bias) for tensor in reader.tensors))
    head = _field(reader, f"{architecture}.attention.key_length")
    for attribute in ("head_dim", "query_pre_attn_scalar"):
        if head is not None and getattr(config, attribute, None) is not None:
            setattr(config, attribute, int(head))


def _restore_rope_scaling(path: Path, reader: gguf.GGUFReader, config: Any, architecture: str) -> None:
    """Long-context rope: recovered for Llama 3 from the factors in the file, else refused, never left out."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = getattr(config, "rope_parameters", None) or {}
    rules = [rope, *(rule for rule in rope.values() if isinstance(rule, dict))]
    if any(rule.get("rope_type", "default") != "default" for rule in rules):
        return  # transformers knows the rule of this architecture
    kind = _field(reader, f"{architecture}.rope.scaling.type", "none")
    factor = _field(reader, f"{architecture}.rope.scaling.factor", 1.0)
    if kind != "none" and factor != 1.0:
        raise CheckpointError(f"{path}: transformers drops its rope scaling {kind!r} by {factor:g}; {_INSTEAD}.")
    stored = next((tensor for tensor in reader.tensors if tensor.name == _ROPE_FREQS), None)
    if stored is None:
        return
    divisors = torch.from_numpy(np.array(stored.data, dtype=np.float32))
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": rope.get("rope_theta", 10000.0),
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    with _or_refuse(f"{path}: {_ROPE_FREQS} is not llama3 rope scaling: {config.rope_parameters}"):
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        plain = config.rope_parameters["rope_theta"] ** (-torch.arange(len(divisors)) / len(divisors))
        if not torch.allclose(plain / scaled, divisors, rtol=1e-4):
            raise ValueError(f"the rule gives {plain / scaled}")


def _empty_model(path: Path, config: Any, dtype: torch.dtype) -> Any:
    """The model on the meta device: names, shapes and dtypes without memory."""
    with _or_refuse(f"{path}: no {config.model_type!r} model fits its metadata"), torch.device("meta"):
        if config.architectures:  # an encoder alone, which only the file knows
            return getattr(transformers, config.architectures[0])._from_config(config, dtype=dtype)
        causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
        auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSeq2SeqLM
        return auto.from_config(config, dtype=dtype)


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


def _sources(path: Path, reader: gguf.GGUFReader, model: Any) -> tuple[dict[str, list[str]], _Convert]:
    """Which tensors make each weight, and how. Every tensor has a place, and every weight a source."""
    architecture, kind = _field(reader, "general.architecture"), type(model).__name__
    names = [tensor.name for tensor in reader.tensors if tensor.name != _ROPE_FREQS]
    with _or_refuse(f"{path}: this transformers has no tensor names for architecture {architecture!r}"):
        from transformers.integrations.gguf import is_gguf_arch_supported as is_renamed

        read = _renamed if is_renamed(architecture) else _mapped
        targets, convert = read(architecture, model, names)
    tied, weights = model.all_tied_weights_keys, model.state_dict()
    sources: dict[str, list[str]] = {}
    for name, target in targets.items():
        if target in weights and target not in tied:
            sources.setdefault(target, []).append(name)
        elif target not in weights and not _matches(target, model._keys_to_ignore_on_load_unexpected):
            raise CheckpointError(f"{path}: tensor {name} has no place in {kind}; {_INSTEAD}.")
    rebuilt = {n for n, _ in model.named_buffers() if _matches(n, model._keys_to_ignore_on_load_missing)}
    missing = sorted(weights.keys() - sources.keys() - tied.keys() - rebuilt)
    if missing:
        raise CheckpointError(f"{path}: no tensor for {missing[0]}, of {len(missing)} missing; {_INSTEAD}.")
    return sources, convert


def _matches(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _weights(
    path: Path, reader: gguf.GGUFReader, model: Any, progress: Progress | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every weight as a Hugging Face checkpoint has them, in the model's order."""
    from transformers.core_model_loading import revert_weight_conversion

    sources, convert = _sources(path, reader, model)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    expected = {name: weight for name, weight in model.state_dict().items() if name in sources}
    for done, (name, weight) in enumerate(expected.items(), 1):
        with _or_refuse(f"{path}: {name} cannot be made of {', '.join(sources[name])}"):
            stored = [tensors[source] for source in sources[name]]
            value = convert(name, {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in stored})
            if value.shape != weight.shape:
                raise ValueError(f"it has shape {list(value.shape)}, the model wants {list(weight.shape)}")
        # Checkpoints keep experts apart where the module holds them stacked; `save_pretrained` does the same.
        yield from revert_weight_conversion(model, {name: value.to(weight.dtype)}).items()
        if progress:
            progress(done, len(expected), name)


def _write_shards(folder: Path, weights: Iterable[tuple[str, torch.Tensor]], max_shard_size: int) -> None:
    """Safetensors shards of at most `max_shard_size` bytes (one tensor at least), and an index if several."""
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
