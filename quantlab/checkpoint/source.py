"""Where a model comes from: a skeleton without weights, and the weights, a part at a time.

Load everything and the model is the one that ``from_pretrained(folder, dtype="auto")`` gives, to the bit,
with the experts of a mixture taken apart.
"""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from quantlab.checkpoint.placement import Places, Select, assign, parameter_bytes, selected, unload
from quantlab.checkpoint.skeleton import (
    auto_dtype,
    empty_model,
    fill_non_persistent_buffers,
    may_be_absent,
    model_class,
    read_config,
    untie,
)
from quantlab.checkpoint.weights import WeightFiles, WeightPlan
from quantlab.errors import CheckpointError
from quantlab.experts import UnfusedExperts, unfuse_experts

__all__ = [
    "FolderSource",
    "ModelSource",
    "ModuleSource",
    "Select",
    "open_source",
    "parameter_bytes",
    "unload",
]


class ModelSource(ABC):
    """A model to be quantized, a part of which can be in memory.

    Attributes:
        folder: with tokenizer and other assets, or None.
        config: the model's.
        dtype: of its weights.
        device: where what is loaded from it is.
    """

    folder: Path | None
    config: PretrainedConfig
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def skeleton(self) -> PreTrainedModel:
        """The model in eval mode, weights tied, experts taken apart, nothing requiring gradients.

        Parameters and persistent buffers are on the meta device; non-persistent buffers (rotary frequencies)
        are real.
        """

    @abstractmethod
    def load(self, model: nn.Module, select: Select = "") -> None:
        """Fill those of a skeleton's selected parameters and persistent buffers that are on the meta device.

        Tensors that are real already stay. A tied weight appears at each of its places. What was loaded may
        be changed in place; the source is not.

        Raises:
            CheckpointError: there are no weights for one of them, or they do not fit.
        """

    def expect(self, model: nn.Module, select: Select = "") -> None:  # noqa: B027 - not every source can
        """Say that these tensors will be loaded soon, so that the system may read them while others are at work."""

    def memory_reused(self) -> AbstractContextManager[None]:
        """Within this, what is unloaded may stay in memory to be loaded into: for who loads block after block."""
        return nullcontext()

    def unload(self, model: nn.Module, select: Select = "") -> None:
        """Undo :meth:`load`: see :func:`unload`."""
        unload(model, select)

    @abstractmethod
    def fingerprint(self) -> str:
        """A short identity of config and weights; equal for the same, unchanged source."""

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            CheckpointError: it has none that can be loaded.
        """
        if self.folder is None:
            raise CheckpointError("a model in memory has no tokenizer; pass the folder that it came from")
        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # transformers raises many kinds
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{self.folder}: its tokenizer cannot be loaded ({reason}); put the model's tokenizer files there, "
                "or pass a tokenizer or token ids"
            ) from error


def open_source(folder: Path) -> FolderSource:
    """The model in a local Hugging Face folder (safetensors or older ``.bin`` files, sharded or not).

    Raises:
        CheckpointError: not such a folder, quantized already, a model that transformers does not have, weight
            files that are missing or cut short.
    """
    return FolderSource(folder)


class FolderSource(ModelSource):
    """A local folder in the Hugging Face layout; see :func:`open_source`."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self._class = model_class(self.config, self.folder)
        self._files = WeightFiles(self.folder)
        self.dtype = auto_dtype(self.config, (stored.dtype for stored in self._files.stored.values()))
        self._made_plan: WeightPlan | None = None

    def skeleton(self) -> PreTrainedModel:
        """See :meth:`ModelSource.skeleton`.

        Raises:
            CheckpointError: weights are missing from the files or do not fit the config.
        """
        model = empty_model(self._class, self.config, self.dtype)
        untie(model, self._plan.untied)
        fill_non_persistent_buffers(model)
        unfuse_experts(model)
        return model.requires_grad_(False).eval()

    def load(self, model: nn.Module, select: Select = "") -> None:
        """See :meth:`ModelSource.load`."""
        plan = self._plan
        wanted: dict[str, list[tuple[Places, _Origin]]] = {}
        absent: list[Places] = []
        for tensor, places in selected(model, select):
            if tensor.is_meta:
                origins = (_origin(name, plan.targets, plan.model) for _, _, name in places)
                origin = next((origin for origin in origins if origin.tensor in plan), None)
                if origin is None:
                    absent.append(places)
                else:
                    wanted.setdefault(origin.tensor, []).append((places, origin))
        _initialize_absent(model, absent, plan)
        ready: dict[str, torch.Tensor] = {}
        for target, parts in wanted.items():
            if target not in ready:
                ready |= {name: value for name, value in plan.read(target).items() if name in wanted}
            whole = ready.pop(target)
            for places, origin in parts:
                assign(places, origin.part_of(whole))

    def expect(self, model: nn.Module, select: Select = "") -> None:
        """See :meth:`ModelSource.expect`."""
        plan = self._plan
        for _, places in selected(model, select):
            names = (_origin(name, plan.targets, plan.model).tensor for _, _, name in places)
            target = next((name for name in names if name in plan), None)
            if target is not None:
                plan.expect(target)

    def memory_reused(self) -> AbstractContextManager[None]:
        """See :meth:`ModelSource.memory_reused`."""
        return self._files.memory_reused()

    def fingerprint(self) -> str:
        """See :meth:`ModelSource.fingerprint`; of the files' sizes, times of change and headers."""
        stats = [(file.name, file.stat()) for file in self._files.files]
        files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        stored = [[name, str(t.dtype), list(t.shape)] for name, t in sorted(self._files.stored.items())]
        return digest(files, stored, self.config)

    @property
    def _plan(self) -> WeightPlan:
        if self._made_plan is None:
            plan = WeightPlan(empty_model(self._class, self.config, self.dtype), self._files, self.dtype)
            _refuse_missing(plan)
            self._made_plan = plan
        return self._made_plan


class ModuleSource(ModelSource):
    """A model in memory, which is left as it is: what is loaded from it is copied.

    Args:
        model: with all its weights in memory.
        folder: with its tokenizer and other assets, or None.

    Raises:
        CheckpointError: it is quantized already, or some of its weights are on the meta device.
    """

    def __init__(self, model: PreTrainedModel, folder: Path | None = None) -> None:
        if getattr(model.config, "quantization_config", None) is not None:
            raise CheckpointError(f"{type(model).__name__}: is quantized already; start from the original model")
        self._tensors = {name: tensor for tensor, places in selected(model) for _, _, name in places}
        if empty := [name for name, tensor in self._tensors.items() if tensor.is_meta]:
            raise CheckpointError(f"{type(model).__name__}: {empty[0]} is not in memory")
        self._model = model
        self.folder = folder
        self.dtype = model.dtype
        self.config = copy.deepcopy(model.config)
        self.config.architectures = [type(model).__name__]  # as save_pretrained writes them
        self.config.dtype = self.dtype

    def skeleton(self) -> PreTrainedModel:
        """See :meth:`ModelSource.skeleton`; non-persistent buffers are copies of the model's."""
        memo: dict[int, Any] = {}  # what deepcopy takes instead of copying a tensor
        for tensor in self._tensors.values():
            empty = torch.empty_like(tensor, device="meta")
            memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
        model = copy.deepcopy(self._model, memo)
        unfuse_experts(model)
        return model.requires_grad_(False).eval()

    def load(self, model: nn.Module, select: Select = "") -> None:
        """See :meth:`ModelSource.load`."""
        for tensor, places in selected(model, select):
            if tensor.is_meta:
                name = places[0][2]
                origin = _origin(name, self._tensors, self._model)
                if origin.tensor not in self._tensors:
                    raise CheckpointError(f"{name}: the model in memory has no weights for it")
                assign(places, origin.part_of(self._tensors[origin.tensor].detach()).clone())

    def fingerprint(self) -> str:
        """See :meth:`ModelSource.fingerprint`; of shapes and of a few elements of every tensor."""
        samples = []
        for name, tensor in sorted(self._tensors.items()):
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // 64)].double().cpu().tolist()
            samples.append([name, str(tensor.dtype), list(tensor.shape), some])
        return digest(samples, self.config)


@dataclass(frozen=True)
class _Origin:
    """Where a tensor of a skeleton comes from: all of a tensor, or one expert of it, perhaps transposed."""

    tensor: str
    expert: int | None = None
    transposed: bool = False

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        part = whole if self.expert is None else whole[self.expert]
        return part.T if self.transposed else part


def _origin(name: str, tensors: dict[str, torch.Tensor], model: nn.Module) -> _Origin:
    """The origin of the skeleton's tensor ``name`` in ``model``, whose experts may be fused."""
    if name not in tensors:
        parts = name.split(".")
        for cut in [i for i, part in enumerate(parts) if part.isdigit()]:
            experts, (leaf, expert) = ".".join(parts[:cut]), UnfusedExperts.origin(".".join(parts[cut:]))
            if f"{experts}.{leaf}" in tensors:
                transposed = bool(model.get_submodule(experts).is_transposed) and parts[-1] == "weight"
                return _Origin(f"{experts}.{leaf}", expert, transposed)
    return _Origin(name)


def _refuse_missing(plan: WeightPlan) -> None:
    groups = [[name for _, _, name in places] for _, places in selected(plan.model)]
    missing = [names[0] for names in groups if not any(name in plan for name in names)]
    missing = [name for name in missing if not may_be_absent(plan.model, name)]
    if missing:
        some = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise CheckpointError(
            f"the files lack {len(missing)} of the weights of {type(plan.model).__name__}: {some}; "
            "the folder is incomplete, or its config.json names the wrong architecture"
        )


def _initialize_absent(model: nn.Module, absent: list[Places], plan: WeightPlan) -> None:
    """Give tensors that the class says may be absent from files the values that the class starts with."""
    for places in absent:
        module, leaf, name = places[0]
        if not isinstance(model, PreTrainedModel) or not may_be_absent(plan.model, name):
            raise CheckpointError(f"{name}: the files have no weights for it")
        assign(places, torch.empty_like(getattr(module, leaf), device="cpu"))
        vars(module)["_is_hf_initialized"] = False
    if absent and isinstance(model, PreTrainedModel):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.initialize_weights()


def digest(*identity: Any) -> str:
    """A short hash of JSON-able values and configs."""
    plain = [json.loads(x.to_json_string()) if isinstance(x, PretrainedConfig) else x for x in identity]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
