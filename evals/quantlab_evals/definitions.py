"""Other people's perplexities, by name: the same text cut and scored as their tools do.

They differ from this package's own definition in where windows begin with BOS, how long they are, and which
tokens are predicted, and so they differ in value: compare figures of one definition only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .errors import EvalError
from .windows import JOINER, Windows, cut, leading_tokens, tokenize_documents

OWN = "quantlab"
GPTQ = (
    "that of the GPTQ papers (arXiv:2210.17323, as in their published evaluation): documents joined by two line ends, "
    "tokenized once as the tokenizer does it by default, BOS at the very start if it adds one; windows of 2048 "
    "tokens that do not overlap, all but the first token predicted; exp of the mean negative log-likelihood"
)
LLAMA_CPP = (
    "that of llama.cpp's perplexity tool: the text without one final line end, tokenized once, with BOS at the "
    "start if the tokenizer adds one; windows of 512 tokens that do not overlap, whose first token is replaced "
    "by BOS if the tokenizer adds one; in each the tokens after the first length / 2 + 1 are predicted; exp of "
    "the mean negative log-likelihood"
)
_LENGTHS = {"gptq": 2048, "llama.cpp": 512}
NAMES = (OWN, *_LENGTHS)


def default_length(definition: str) -> int:
    """The length of window that a definition of someone else's is known for.

    Raises `EvalError` if there is no such definition.
    """
    if definition not in _LENGTHS:
        raise EvalError(f"definition {definition!r} of perplexity: use one of {', '.join(NAMES)}")
    return _LENGTHS[definition]


def windows_as(
    definition: str, tokenizer: Any, documents: Sequence[str], length: int | None = None, *, limit: int | None = None
) -> Windows:
    """Cut documents into windows as `gptq` or `llama.cpp` does; `perplexity` then scores them as it does.

    `length` is the tool's own if None. Raises `EvalError` if there is no such definition, or not text enough
    for one window.
    """
    length = default_length(definition) if length is None else length
    if definition == "gptq":
        stream, origin = tokenize_documents(tokenizer, documents, JOINER, special=True)
        return replace(cut(stream, origin, documents, length, limit=limit), definition=GPTQ)
    documents = [*documents[:-1], documents[-1].removesuffix("\n")]
    stream, origin = tokenize_documents(tokenizer, documents, JOINER, special=True)
    windows = cut(stream, origin, documents, length, limit=limit)
    leading = leading_tokens(tokenizer)
    if leading:
        tokens = torch.cat([torch.full((len(windows), 1), leading[0]), windows.tokens[:, 1:]], dim=1)
        windows = replace(windows, tokens=tokens, bos=leading[0])
    return replace(windows, context=length // 2 + 1, definition=LLAMA_CPP)
