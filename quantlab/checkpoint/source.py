"""Where a model comes from: a skeleton without weights, and the weights, a part at a time.

Load everything and the model is the one that ``from_pretrained(folder, dtype="auto")`` gives, to the bit, with the
experts of a mixture taken apart.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from quantlab.checkpoint.weights import WeightFiles, WeightPlan
from quantlab.errors import CheckpointError
from quantlab.nn import UnfusedExperts, unfuse_experts

Select = str | Callable[[str], bool]
"""Which parameters: a module's name (all that is under it, ``""`` for everything), or a predicate of full names."""


class ModelSource(ABC):
    """A model to be quantized, a part of which can be in memory.

    Attributes:
        folder: with tokenizer and other assets, or None.
        config: the model's.
        dtype: of its weights.
    """

    folder: Path | None
    config: PretrainedConfig
    dtype: torch.dtype

    @abstractmethod
    def skeleton(self) -> PreTrainedModel:
        """The model in eval mode, weights tied, experts taken apart: parameters and persistent buffers on the meta
        device, non-persistent buffers (rotary frequencies) real.
        """

    @abstractmethod
    def load(self, model: nn.Module, select: Select = "") -> None:
        """Fill the selected parameters and persistent buffers of a skeleton that are on the meta device.

        Tensors that are already there stay. A tied weight appears at each of its places.

        Raises:
            CheckpointError: there are no weights for one of them, or they do not fit.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A short identity of config and weights; equal for the same, unchanged source."""

    def unload(self, model: nn.Module, select: Select = "") -> None:
        """Put the selected parameters and persistent buffers back to the meta device, at each of their places."""
        for tensor, places in _selected(model, select):
            if not tensor.is_meta:
                _assign(places, torch.empty_like(tensor, device="meta"))

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            CheckpointError: it has none that can be loaded.
        """
        if self.folder is None:
            raise CheckpointError("a model in memory has no tokenizer; pass one as tokenizer=")
        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # transformers raises many kinds
            raise CheckpointError(f"{self.folder}: its tokenizer cannot be loaded: {error}") from error


class FolderSource(ModelSource):
    """A local folder in the Hugging Face layout."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config = _read_config(self.folder)
        self._class = _model_class(self.config, self.folder)
        self._files = WeightFiles(self.folder)
        self.dtype = _auto_dtype(self.config, self._files)
        self._plan: WeightPlan | None = None
        self._untied: list[str] = []

    def skeleton(self) -> PreTrainedModel:
        """See :meth:`ModelSource.skeleton`.

        Raises:
            CheckpointError: weights are missing from the files or do not fit the config.
        """
        model = self._empty_model()
        if self._plan is None:
            self._plan = WeightPlan(model, self._files, self.dtype)
            self._untied = _differently_stored_ties(model, self._plan)
            _refuse_missing(model, self._plan)
            model = self._empty_model()  # the plan keeps the first one
        for name in self._untied:
            parent, _, leaf = name.rpartition(".")
            tied = model.get_parameter(name)
            setattr(model.get_submodule(parent), leaf, nn.Parameter(torch.empty_like(tied)))
            model.all_tied_weights_keys.pop(name)
        _fill_non_persistent_buffers(model)
        unfuse_experts(model)
        return model.requires_grad_(False).eval()

    def load(self, model: nn.Module, select: Select = "") -> None:
        """See :meth:`ModelSource.load`."""
        plan = self._plan or self._made_plan()
        wanted: dict[str, list[tuple[_Places, int | None, bool]]] = {}
        absent: list[_Places] = []
        for tensor, places in _selected(model, select):
            if not tensor.is_meta:
                continue
            origins = [_origin(name, plan) for _, _, name in places]
            origin = next((origin for origin in origins if origin[0] in plan), None)
            if origin is None:
                absent.append(places)
            else:
                wanted.setdefault(origin[0], []).append((places, *origin[1:]))
        _initialize_absent(model, absent, plan)
        ready: dict[str, torch.Tensor] = {}
        for target, parts in wanted.items():
            if target not in ready:
                ready |= {name: value for name, value in plan.read(target).items() if name in wanted}
            whole = ready.pop(target)
            for places, expert, transposed in parts:
                part = whole if expert is None else whole[expert]
                _assign(places, part.T if transposed else part)

    def fingerprint(self) -> str:
        """See :meth:`ModelSource.fingerprint`; of names, sizes and times of change, without reading the weights."""
        files = []
        for file in self._files.files:
            stat = file.stat()
            files.append([file.name, stat.st_size, stat.st_mtime_ns])
        shapes = {name: [str(t.dtype), list(t.shape)] for name, t in sorted(self._files.stored.items())}
        return _digest([files, shapes, json.loads(self.config.to_json_string())])

    def _made_plan(self) -> WeightPlan:
        self.skeleton()
        assert self._plan is not None
        return self._plan

    def _empty_model(self) -> PreTrainedModel:
        config = copy.deepcopy(self.config)
        with torch.device("meta"):
            return self._class._from_config(config, dtype=self.dtype)


class ModuleSource(ModelSource):
    """A model in memory, which is left as it is: what is loaded from it is copied.

    Args:
        model: with all its weights in memory.
        folder: with its tokenizer and other assets, or None.
    """

    def __init__(self, model: PreTrainedModel, folder: Path | None = None) -> None:
        if any(tensor.is_meta for tensor, _ in _selected(model, "")):
            raise CheckpointError(f"{type(model).__name__}: some of its weights are not in memory")
        self.folder = folder
        self.config = model.config
        self.dtype = model.dtype
        self._model = model
        self._whole = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )

    def skeleton(self) -> PreTrainedModel:
        """See :meth:`ModelSource.skeleton`; non-persistent buffers are copies of the model's."""
        memo: dict[int, Any] = {}
        for tensor, _ in _selected(self._model, ""):
            empty = torch.empty_like(tensor, device="meta")
            memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
        model = copy.deepcopy(self._model, memo)
        unfuse_experts(model)
        return model.requires_grad_(False).eval()

    def load(self, model: nn.Module, select: Select = "") -> None:
        """See :meth:`ModelSource.load`."""
        for tensor, places in _selected(model, select):
            if tensor.is_meta:
                origin, expert, transposed = _origin(places[0][2], self)
                if origin not in self:
                    raise CheckpointError(f"{places[0][2]}: the model in memory has no such weight")
                whole = self._whole[origin].detach()
                part = whole if expert is None else whole[expert]
                _assign(places, (part.T if transposed else part).clone())

    def fingerprint(self) -> str:
        """See :meth:`ModelSource.fingerprint`; of shapes and of a few elements of every tensor."""
        samples = []
        for name, tensor in sorted(self._whole.items()):
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // 64)].double().cpu().tolist()
            samples.append([name, str(tensor.dtype), list(tensor.shape), some])
        return _digest([samples, json.loads(self.config.to_json_string())])

    @property
    def model(self) -> nn.Module:
        """The model in memory."""
        return self._model

    def __contains__(self, name: str) -> bool:
        return name in self._whole


def open_source(folder: Path) -> FolderSource:
    """The model in a local Hugging Face folder (safetensors or older ``.bin`` files, sharded or not).

    Raises:
        CheckpointError: not such a folder, already quantized, a model that transformers does not have, weights that
            are missing or cut short.
    """
    return FolderSource(folder)


def parameter_bytes(model: nn.Module, select: Select = "") -> int:
    """Bytes that the selected parameters and persistent buffers take, or would take once loaded."""
    return sum(tensor.numel() * tensor.element_size() for tensor, _ in _selected(model, select))


_Places = list[
    tuple[nn.Module, str, str]
]  # (module, attribute, full name): where one tensor stands in the model


def _selected(model: nn.Module, select: Select) -> list[tuple[torch.Tensor, _Places]]:
    """Every parameter and persistent buffer of which some name is selected, once, with all its places."""
    places: dict[int, tuple[torch.Tensor, _Places]] = {}
    chosen: dict[int, None] = {}
    for module, leaf, name, tensor in _tensors(model):
        places.setdefault(id(tensor), (tensor, []))[1].append((module, leaf, name))
        if name.startswith(f"{select}." if select else "") if isinstance(select, str) else select(name):
            chosen[id(tensor)] = None
    return [places[key] for key in chosen]


def _tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, torch.Tensor]]:
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for leaf, tensor in module._parameters.items():
            if tensor is not None:
                yield module, leaf, prefix + leaf, tensor
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                yield module, leaf, prefix + leaf, buffer


def _assign(places: _Places, tensor: torch.Tensor) -> None:
    parameter = None
    for module, leaf, _ in places:
        if leaf in module._parameters:
            parameter = nn.Parameter(tensor, requires_grad=False) if parameter is None else parameter
            module._parameters[leaf] = parameter
        else:
            module._buffers[leaf] = tensor


def _origin(name: str, source: WeightPlan | ModuleSource) -> tuple[str, int | None, bool]:
    """Where the tensor ``name`` of a skeleton comes from: the tensor, the expert in it, whether it lies transposed."""
    if name in source:
        return name, None, False
    parts = name.split(".")
    for cut in range(len(parts) - 3, 0, -1):
        if parts[cut].isdigit() and (origin := UnfusedExperts.origin(".".join(parts[cut:]))):
            experts = ".".join(parts[:cut])
            if f"{experts}.{origin[0]}" in source:
                fused = source.model.get_submodule(experts)
                return (
                    f"{experts}.{origin[0]}",
                    origin[1],
                    bool(fused.is_transposed) and parts[-1] == "weight",
                )
    return name, None, False


def _read_config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json; expected a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # unknown model types and damaged files come in many kinds
        raise CheckpointError(f"{folder}/config.json: {error}") from error
    for part in (config, config.get_text_config()):
        if quantized := getattr(part, "quantization_config", None):
            method = (
                quantized.get("quant_method", "unknown")
                if isinstance(quantized, dict)
                else quantized.quant_method
            )
            raise CheckpointError(
                f"{folder}: is already quantized (quant_method {method}); start from the original, full-precision model"
            )
    return config


def _model_class(config: PretrainedConfig, folder: Path) -> type[PreTrainedModel]:
    named = (config.architectures or [None])[0]
    if named is not None:
        found = getattr(transformers, named, None)
        if found is None:
            raise CheckpointError(
                f"{folder}: its architecture {named} is not part of transformers {transformers.__version__}; models "
                "with code of their own are not supported"
            )
        return found
    for auto in (AutoModelForCausalLM, AutoModel):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise CheckpointError(f"{folder}: transformers has no model for {type(config).__name__}")


def _auto_dtype(config: PretrainedConfig, files: WeightFiles) -> torch.dtype:
    dtype = config.dtype
    if dtype is None:
        floats = (stored.dtype for stored in files.stored.values() if stored.dtype.is_floating_point)
        dtype = next(floats, torch.float32)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _differently_stored_ties(model: PreTrainedModel, plan: WeightPlan) -> list[str]:
    """Weights that the config ties, but that the files hold twice with different values: transformers unties them."""
    untied = []
    for target, origin in model.all_tied_weights_keys.items():
        if (
            target in plan
            and origin in plan
            and not torch.equal(plan.read(target)[target], plan.read(origin)[origin])
        ):
            untied.append(target)
    return untied


def _refuse_missing(model: PreTrainedModel, plan: WeightPlan) -> None:
    missing = [
        name
        for _, places in _selected(model, "")
        if not any(name in plan for _, _, name in places)
        for name in [places[0][2]]
        if not _may_be_absent(model, name)
    ]
    if missing:
        some = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise CheckpointError(
            f"the weights for {len(missing)} tensors of {type(model).__name__} are not in the files: {some}; the "
            "folder is incomplete, or config.json names the wrong architecture"
        )


def _may_be_absent(model: PreTrainedModel, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())


def _initialize_absent(model: nn.Module, absent: list[_Places], plan: WeightPlan) -> None:
    """Give tensors that the model class says may be absent from files the values that the class starts with."""
    for places in absent:
        module, leaf, name = places[0]
        if not _may_be_absent(plan.model, name):
            raise CheckpointError(f"{name}: the files have no weights for it")
        _assign(places, torch.empty_like(getattr(module, leaf), device="cpu"))
        module._is_hf_initialized = False
    if absent and isinstance(model, PreTrainedModel):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.initialize_weights()


def _fill_non_persistent_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no file holds, as from_pretrained does; parameters stay on the meta device."""
    for _, _, _, tensor in _tensors(model):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for name, buffer in list(model.named_non_persistent_buffers()):
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()


def _digest(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
