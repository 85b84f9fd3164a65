"""From text to the batches of tokens that the layers will see."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from quantlab_evals import check_length, load_documents, token_windows

from quantlab.errors import DataError
from quantlab.recipe import Calibration

# Tokens that run through the model at once: enough for matrix products to be efficient, few enough to stay small.
_BATCH_TOKENS = 1024
# Documents that are read for each sequence, at most, from sources that could go on for ever.
_DOCUMENTS_A_SEQUENCE = 32


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """Token ids int64 ``[samples, length]``, and how they came about."""

    tokens: torch.Tensor
    description: dict[str, Any]

    def batches(self) -> list[torch.Tensor]:
        """The sequences in batches of about 1024 tokens; in four or more where there are four sequences."""
        sequences, length = self.tokens.shape
        return list(self.tokens.split(max(1, min(_BATCH_TOKENS // length, sequences // 4))))


CalibrationText = Sequence[str] | torch.Tensor | CalibrationData


def prepare(choice: Calibration, tokenizer: Any, config: Any, text: CalibrationText | None = None) -> CalibrationData:
    """Draw the calibration sequences.

    Documents are joined and cut into windows, so none is dropped or cut short; of the windows, ``choice.samples`` are
    drawn at random. Every window begins with BOS where the model's tokenizer adds one.

    Args:
        choice: the recipe's choice of data.
        tokenizer: the model's; not needed for token ids.
        config: the model's configuration.
        text: instead of ``choice.source``: a list of documents, token ids int64 ``[samples, length]``, or sequences
            that were drawn before.

    Raises:
        DataError: token ids of the wrong shape or range.
        EvalError: text that cannot be found or is too short, or sequences longer than the model's positions.
    """
    if isinstance(text, CalibrationData):
        return text
    if isinstance(text, torch.Tensor):
        return _from_tokens(text, config)
    if text is not None and (isinstance(text, str) or not all(isinstance(document, str) for document in text)):
        raise DataError(
            f"calibration is a {type(text).__name__}; give a list of documents (strings), or token ids as an integer "
            "tensor [samples, length]; a file or data set is named in the recipe: --set calibration.source=..."
        )
    check_length(config, choice.length)
    source = choice.source if text is None else "given documents"
    documents = list(text) if text is not None else load_documents(
        choice.source, limit=_DOCUMENTS_A_SEQUENCE * choice.samples
    )  # fmt: skip
    windows = token_windows(tokenizer, documents, choice.length, bos=choice.bos)
    drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(choice.seed))[: choice.samples]
    tokens = windows.tokens[drawn.sort().values]
    return CalibrationData(tokens, {**_describe(tokens, source), "bos": windows.bos, "available": len(windows)})


def _from_tokens(tokens: torch.Tensor, config: Any) -> CalibrationData:
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.numel() == 0:
        raise DataError(
            f"calibration token ids are integers [samples, length], not {tokens.dtype} {tuple(tokens.shape)}"
        )
    check_length(config, tokens.shape[1])
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)  # vision models have none
    if vocabulary is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise DataError(
            f"calibration token ids go from {int(tokens.min())} to {int(tokens.max())}, and the model's vocabulary has "
            f"{vocabulary} entries; use the model's own tokenizer"
        )
    return CalibrationData(tokens.long(), _describe(tokens.long(), "given token ids"))


def _describe(tokens: torch.Tensor, source: str) -> dict[str, Any]:
    return {
        "source": source,
        "samples": tokens.shape[0],
        "length": tokens.shape[1],
        "tokens": tokens.numel(),
        "sha256": hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest(),
    }
