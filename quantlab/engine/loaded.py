"""Which weights are in memory while a model is walked through: one block's, and little of what is in no block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from quantlab.checkpoint.source import ModelSource
from quantlab.engine.architecture import OUTSIDE, Architecture, get_weight, set_weight
from quantlab.engine.hooks import hooked
from quantlab.engine.memory import return_freed_memory
from quantlab.numerics import QTensor


class LoadedWeights:
    """The weights of a model, and of twins with its structure, that come and go with the blocks.

    What is outside the blocks stays when it was loaded (norms, and what a model keeps beside its layers), but for the
    large matrices there: embeddings, and heads that stay as they are. These leave with every block that leaves, and
    an embedding comes back when it is called.

    Args:
        source: where weights come from.
        model: a skeleton on the meta device, before anything was loaded or added to it.
        architecture: its parts.
        planned: names of the layers that are quantized.
    """

    def __init__(
        self, source: ModelSource, model: nn.Module, architecture: Architecture, planned: Collection[str]
    ) -> None:
        self._source, self._model, self._architecture = source, model, architecture
        # The block that most models run after each block.
        self._following = dict(zip(architecture.blocks, architecture.blocks[1:], strict=False))
        self._unbiased = {name for name in architecture.all_layers if model.get_submodule(name).bias is None}
        large = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
        large += [name for name in architecture.outside if name not in planned]
        # The large matrices outside the blocks: by parameter, the module that it belongs to.
        self._large = {f"{name}.weight": name for name in large if self._belongs(f"{name}.weight", OUTSIDE)}

    def load(self, block: str, models: Sequence[nn.Module]) -> None:
        """Load a block (or ``OUTSIDE``) into each of ``models``, the model itself among them, as the source has it."""
        for name in self._unbiased.intersection(self._architecture.layers.get(block, ())):
            self._model.get_submodule(name).register_parameter("bias", None)  # one that was added is not in the source
        for model in models:
            self._source.load(model, lambda name: self._belongs(name, block))
        if following := self._following.get(block):
            self._source.expect(self._model, lambda name: self._belongs(name, following))

    def unload(self, block: str, models: Sequence[nn.Module]) -> None:
        """Unload a block, and the large matrices outside: who is past them needs them no more."""
        for model in models:
            self._source.unload(model, lambda name: (block and self._belongs(name, block)) or name in self._large)
        return_freed_memory()

    def share_outside(self, twin: nn.Module) -> None:
        """Let the twin use the model's own embeddings and norms: nothing outside the blocks differs before the end."""
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if self._belongs(name, OUTSIDE):
                owner, _, leaf = name.rpartition(".")
                setattr(twin.get_submodule(owner), leaf, parameter)
        self._source.load(twin, lambda name: self._belongs(name, OUTSIDE))  # persistent buffers

    @contextmanager
    def embeddings_on_demand(self, models: Sequence[nn.Module], quantized: Mapping[str, QTensor]) -> Iterator[None]:
        """Load an embedding when it is called: it can be larger than any block, and few models call it twice.

        Args:
            models: the model and its twins.
            quantized: embeddings of the model that are quantized by now, by name; twins keep the original ones.
        """

        def hook(model: nn.Module, weight: str) -> Callable[..., None]:
            def before(module: nn.Module, *_: object) -> None:
                if module.get_parameter("weight").is_meta:
                    self._source.load(model, lambda name: name == weight)
                    if model is self._model and self._large[weight] in quantized:
                        codes = quantized[self._large[weight]].to(self._source.device)
                        set_weight(module, codes.dequantize(get_weight(module).dtype))

            return before

        with hooked(
            model.get_submodule(name).register_forward_pre_hook(hook(model, weight))
            for model in models
            for weight, name in self._large.items()
        ):
            yield

    def _belongs(self, name: str, block: str) -> bool:
        return self._architecture.place_of(name) == block
