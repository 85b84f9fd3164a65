"""A model that is to be measured: named, checked, and loaded late."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quantlab_evals import fingerprint_folder, fingerprint_model
from quantlab_evals.logits import input_device
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from quantlab.checkpoint.baseline import baseline_bytes, load_baseline, split_baseline
from quantlab.checkpoint.load import load
from quantlab.checkpoint.placement import parameter_bytes
from quantlab.checkpoint.resolve import resolve
from quantlab.checkpoint.weights import WeightFiles
from quantlab.checkpoint.writer import weight_bytes
from quantlab.engine.device import Placement, choose_placement
from quantlab.errors import CheckpointError, PreflightError

Device = str | torch.device | None
"""Where models run: :func:`quantlab.engine.device.choose_placement`; None: on the CPU, or where they are already."""


@dataclass(frozen=True)
class Subject:
    """A model to be measured: in memory, or in a folder from which it is loaded late.

    `baseline` is another tool's format (`TOOL:KIND`), into which it is brought as it is loaded; `file` the
    ``.gguf`` file that the folder was made from; `placement` where it is loaded to, None the CPU.
    """

    name: str
    config: Any
    module: PreTrainedModel | None
    folder: Path | None
    baseline: str | None = None
    file: Path | None = None
    placement: Placement | None = None

    @classmethod
    def of(cls, model: str | Path | PreTrainedModel, placement: Placement | None = None) -> Subject:
        """What a person calls a model, with its configuration read.

        Raises:
            QuantlabError: there is none, or it is in memory already, and not where it is wanted.
        """
        if isinstance(model, PreTrainedModel):
            name = model.config.name_or_path or type(model).__name__
            if placement is not None and input_device(model).type != placement.device.type:
                raise PreflightError(
                    f"{name}: a model in memory is measured where it is, on {input_device(model)}; move it to "
                    f"{placement.device} before, or give its folder"
                )
            return cls(name, model.config, model, None)
        baseline = split_baseline(str(model))
        kind, origin = (None, model) if baseline is None else baseline
        folder = resolve(origin)
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{model}: its config.json cannot be read: {error}") from error
        file = Path(origin).expanduser() if str(origin).endswith(".gguf") else None
        return cls(str(model), config, None, folder, kind, file, placement)

    def loaded(self) -> PreTrainedModel:
        """The model, ready to run; raises `QuantlabError` if it cannot be loaded where it is wanted."""
        if self.module is not None:
            return self.module
        assert self.folder is not None
        check_room([self])
        options = {} if self.placement is None else self.placement.loading
        if self.baseline is None:
            return load(self.folder, **options)
        return load_baseline(self.baseline, self.folder, **options)

    def bytes(self, loaded: PreTrainedModel | None = None) -> int:
        """Bytes of the model's weights: of its files, or in memory where there are no files like it."""
        if self.folder is None:
            assert self.module is not None
            return parameter_bytes(self.module)
        if self.baseline is not None:
            return baseline_bytes(self.loaded() if loaded is None else loaded)
        if self.file is not None:
            return self.file.stat().st_size
        return sum(file.stat().st_size for file in WeightFiles(self.folder).files)

    def fingerprint(self) -> str:
        """A hash of everything that the model's predictions come from."""
        if self.folder is None:
            assert self.module is not None
            return fingerprint_model(self.module)
        elsewhere = "" if self.placement is None or self.placement.device.type == "cpu" else self.placement.device.type
        return ":".join(filter(None, (fingerprint_folder(self.folder), self.baseline, elsewhere)))

    @property
    def positions(self) -> int | None:
        """How many positions the model has; None if it does not say."""
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return longest if isinstance(longest, int) and longest > 0 else None


def tokenizer_of(subjects: Sequence[Subject]) -> Any:
    """The tokenizer of the first that has one: a model and its original read text alike."""
    folders = [subject.folder for subject in subjects if subject.folder is not None]
    failures = []
    for folder in folders:
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises many kinds
            failures.append(f"{folder}: its tokenizer cannot be loaded: {error}")
    raise CheckpointError("; ".join(failures) or "a model in memory has no tokenizer; pass one: tokenizer=...")


def placed(device: Device) -> Placement | None:
    """Where models are to be loaded; None: nobody says.

    Raises:
        PreflightError: the device is not there.
    """
    return None if device is None else choose_placement(device)


def check_room(subjects: Iterable[Subject]) -> None:
    """Refuse, before anything is loaded, models that their device has no room for all at once.

    Raises:
        PreflightError: says how much there is.
    """
    sizes: dict[Placement, int] = {}
    for subject in subjects:
        # What other tools make of a model as it is loaded is smaller than its files.
        if subject.placement is not None and subject.folder is not None and subject.baseline is None:
            size = weight_bytes(subject.folder)
            sizes[subject.placement] = sizes.get(subject.placement, 0) + size
    for placement, size in sizes.items():
        placement.refuse_too_large(size)


def load_named(name: str, device: str | None = None) -> PreTrainedModel:
    """The model that a person calls so, another tool's version of one included."""
    return Subject.of(name, placed(device)).loaded()
