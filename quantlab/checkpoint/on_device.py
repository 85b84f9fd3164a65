"""A source whose weights go to a device as they are loaded: the computing follows them."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers import PreTrainedModel

from quantlab.checkpoint.placement import assign, selected
from quantlab.checkpoint.source import ModelSource, Select


class DeviceSource(ModelSource):
    """Another source's model on a device. Files are read on the CPU, a part at a time, as the other source reads them.

    Args:
        source: the original; a model in memory may be on another device than the one asked for.
        device: where parameters and buffers are to be, the CPU included.
    """

    def __init__(self, source: ModelSource, device: torch.device) -> None:
        self.source, self.folder, self.config, self.dtype = source, source.folder, source.config, source.dtype
        self.device = device

    def skeleton(self) -> PreTrainedModel:
        """See :meth:`ModelSource.skeleton`; buffers that are real are on the device."""
        model = self.source.skeleton()
        for name, buffer in list(model.named_non_persistent_buffers()):
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = buffer.to(self.device)
        return model

    def load(self, model: nn.Module, select: Select = "") -> None:
        """See :meth:`ModelSource.load`."""
        empty = [places for tensor, places in selected(model, select) if tensor.is_meta]
        self.source.load(model, select)
        for places in empty:
            module, leaf, _ = places[0]
            assign(places, getattr(module, leaf).data.to(self.device))

    def expect(self, model: nn.Module, select: Select = "") -> None:
        """See :meth:`ModelSource.expect`."""
        self.source.expect(model, select)

    def memory_reused(self) -> AbstractContextManager[None]:
        """See :meth:`ModelSource.memory_reused`."""
        return self.source.memory_reused()

    def fingerprint(self) -> str:
        """The original's."""
        return self.source.fingerprint()
