"""What llama.cpp takes for granted of an architecture, whatever a file says of it.

There are no keys for these: a model that has them otherwise would load and compute something else, or not load. It is
refused, or, where only long texts are concerned, told. What llama.cpp does was seen in its answers
(`tests/export/test_llamacpp.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantlab.errors import CheckpointError
from quantlab.export.gguf_model import Layout, head_size

# Names of one function; `gelu` itself is apart from llama.cpp's tanh form by 5e-4 at most.
_ACTIVATIONS = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu"),
}


def check_assumed(layout: Layout, config: Any, names: Mapping[str, str]) -> tuple[str, ...]:
    """Refuse what llama.cpp would compute otherwise; what a person should know.

    Args:
        layout: of the model's architecture.
        config: the model's.
        names: GGUF's name of each of the model's tensors.

    Raises:
        CheckpointError: names what is otherwise.
    """
    _check_attention(layout, config)
    _check_biases(layout, names)
    attribute = "hidden_activation" if hasattr(config, "hidden_activation") else "hidden_act"
    activation = getattr(config, attribute)
    if activation not in _ACTIVATIONS[layout.activation]:
        raise CheckpointError(
            f"{attribute} {activation!r}: llama.cpp always takes {layout.activation} in {layout.architecture}; "
            "export to compressed-tensors"
        )
    window = _window(config)
    if window is None or layout.full_every or window >= config.max_position_embeddings:
        return ()
    return (
        f"llama.cpp has no sliding window in {layout.architecture}: beyond {window} tokens it attends to some that "
        "this model does not see",
    )


def _check_attention(layout: Layout, config: Any) -> None:
    head, scalar = head_size(config), getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != head:
        raise CheckpointError(
            f"query_pre_attn_scalar {scalar}: llama.cpp scales its attention by the size of a head, {head}"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise CheckpointError("use_bidirectional_attention: llama.cpp lets no token see those after it here")
    if layout.architecture == "gemma2":
        for attribute in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, attribute) is None:
                raise CheckpointError(f"{attribute} None: llama.cpp always caps the logits of gemma2")
    if layout.full_every:
        kinds = [
            ("sliding" if (i + 1) % layout.full_every else "full") + "_attention"
            for i in range(config.num_hidden_layers)
        ]
        if list(config.layer_types) != kinds:
            raise CheckpointError(
                f"layer_types: llama.cpp lets every {layout.full_every}th layer see everything, this model others; "
                "export to compressed-tensors"
            )


def _check_biases(layout: Layout, names: Mapping[str, str]) -> None:
    for name, place in names.items():
        leaf = place.split(".")[-2]
        if name.endswith(".bias") and not leaf.endswith("norm") and leaf not in layout.biases:
            raise CheckpointError(
                f"{name}: llama.cpp has no such bias in {layout.architecture} and does not load a file with one; "
                "use the folder itself with quantlab, or quantize without a compensation that adds biases"
            )
    placed = set(names.values())
    for place in placed:
        stem, _, leaf = place.removesuffix(".weight").rpartition(".")
        if layout.needs_biases and leaf in layout.biases and f"{stem}.{leaf}.bias" not in placed:
            raise CheckpointError(
                f"{place}: has no bias, and llama.cpp does not load a {layout.architecture} without; export to "
                "compressed-tensors"
            )


def _window(config: Any) -> int | None:
    """How far back a layer sees, of those that do not see everything."""
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if kinds is None or "sliding_attention" in kinds else None
