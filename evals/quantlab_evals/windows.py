"""From documents to windows of tokens: one stream, cut into pieces of one length, every choice on record."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .bootstrap import ClusterMeans
from .errors import EvalError

DEFINITION = (
    "exp of the mean negative log-likelihood (natural logarithm) per token: the documents are joined as they "
    "stand, tokenized once and cut into windows that do not overlap; the first token of a window is context "
    "only, every other one is predicted from those before it in its window, and all count the same; "
    "log-probabilities in float32, sums in float64"
)
FEWEST_DOCUMENTS = 10
"""Documents below which windows are resampled instead."""

JOINER = "\n\n"
"""Stands between two documents (as in GPTQ's WikiText-2 evaluation, which most papers follow)."""


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, one a row, and how they were made.

    `tokens` is int64 `[n, length]`. If `bos` is a token, it is the first of every window, and the text's
    own tokens are the other `length - 1`. `stream_tokens` counts the text's own tokens; of these,
    `dropped_tail` at the end did not fill a window, and `beyond_limit` before them were not asked for.
    The first `context` tokens of a window are not predicted. `document` is the number of the document that
    each token comes from, `[n, length]`, where the tokenizer says so. `definition` says in words what a
    perplexity over these windows is.
    """

    tokens: Tensor
    bos: int | None
    dropped_tail: int
    beyond_limit: int
    stream_tokens: int
    documents: int
    joiner: str
    context: int = 1
    document: Tensor | None = None
    definition: str = DEFINITION

    @property
    def length(self) -> int:
        """Tokens in a window, BOS included."""
        return self.tokens.shape[1]

    @property
    def predicted(self) -> int:
        """Tokens of a window that are predicted."""
        return self.length - self.context

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def describe(self) -> dict[str, Any]:
        """Return every choice that was made, as plain values; `sha256` is that of the tokens.

        Two measurements can be compared where these are equal.
        """
        return {
            "windows": len(self),
            "window_length": self.length,
            "overlap": 0,
            "context": self.context,
            "bos": self.bos,
            "documents": self.documents,
            "joiner": self.joiner,
            "stream_tokens": self.stream_tokens,
            "beyond_limit": self.beyond_limit,
            "dropped_tail": self.dropped_tail,
            "sha256": hashlib.sha256(self.tokens.contiguous().numpy().tobytes()).hexdigest(),
        }

    def cluster_means(self, values: Tensor) -> ClusterMeans:
        """Group a value for each predicted token, `[n, predicted]`, by what should be drawn again.

        That is the coarser of windows and documents, as tokens of either depend on each other: windows, where
        they are fewer than the documents or there are not `FEWEST_DOCUMENTS` documents; documents otherwise.
        """
        rows, columns = values.shape
        kind, cluster = "windows", np.repeat(np.arange(rows), columns)
        if self.document is not None:
            document = self.document[:, self.context :].numpy().reshape(-1)
            if FEWEST_DOCUMENTS <= len(np.unique(document)) < rows:
                kind, cluster = "documents", np.unique(document, return_inverse=True)[1]
        tokens = np.bincount(cluster)
        sums = np.bincount(cluster, weights=values.double().numpy().reshape(-1))
        return ClusterMeans(kind, tuple(tokens.tolist()), tuple((sums / tokens).tolist()))


def token_windows(
    tokenizer: Any,
    documents: Sequence[str],
    length: int,
    *,
    limit: int | None = None,
    bos: bool | Literal["auto"] = "auto",
    joiner: str = JOINER,
) -> Windows:
    """Cut documents into windows of `length` tokens that do not overlap.

    The documents are joined as they stand and tokenized once, without adding special tokens (text that
    spells one, such as `<unk>`, is read as the tokenizer reads it); no document is cut short.
    `bos="auto"` begins each window with BOS exactly where the model's own tokenizer adds one; it takes one
    place of the `length`. `limit` keeps the first windows. Raises `EvalError` if there is not text enough
    for one window.
    """
    first = _bos_token(tokenizer, bos)
    stream, origin = tokenize_documents(tokenizer, documents, joiner)
    return cut(stream, origin, documents, length, first=first, limit=limit, joiner=joiner)


def cut(
    stream: Sequence[int],
    origin: NDArray[np.int64] | None,
    documents: Sequence[str],
    length: int,
    *,
    first: int | None = None,
    limit: int | None = None,
    joiner: str = JOINER,
) -> Windows:
    """Cut a stream of tokens into windows that do not overlap; `first` begins each, in one place of the length.

    `origin` is the document of each token. Raises `EvalError` if there is not text enough for one window.
    """
    body = length - (first is not None)
    if body < 1 or length < 2:
        raise EvalError(f"windows of {length} tokens hold nothing to predict; use a length of 2 or more")
    if limit is not None and limit < 1:
        raise EvalError(f"limit is {limit}, a number of windows; use 1 or more, or None for all")
    whole, dropped_tail = divmod(len(stream), body)
    if whole == 0:
        place = " and a BOS" if first is not None else ""
        raise EvalError(
            f"the text has {len(stream)} tokens ({len(documents)} documents, "
            f"{sum(map(len, documents))} characters), and one window of {length} takes {body} of them"
            f"{place}; give more text, or windows of {len(stream) + length - body} tokens or fewer"
        )
    count = whole if limit is None else min(limit, whole)
    tokens = torch.tensor(stream[: count * body], dtype=torch.int64).view(count, body)
    document = None if origin is None else torch.from_numpy(origin[: count * body]).view(count, body)
    if first is not None:
        tokens = torch.cat([torch.full((count, 1), first), tokens], dim=1)
        document = None if document is None else torch.cat([document[:, :1], document], dim=1)
    return Windows(
        tokens=tokens,
        bos=first,
        dropped_tail=dropped_tail,
        beyond_limit=(whole - count) * body,
        stream_tokens=len(stream),
        documents=len(documents),
        joiner=joiner,
        document=document,
    )


def check_length(model_config: Any, length: int) -> None:
    """Raise `EvalError` if windows of `length` tokens are longer than the model has positions for.

    A model that states no `max_position_embeddings` takes any length.
    """
    get_text_config = getattr(model_config, "get_text_config", None)
    config = get_text_config() if get_text_config is not None else model_config
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest > 0:
        raise EvalError(
            f"windows of {length} tokens are longer than the model's max_position_embeddings, {longest}; "
            f"use a window length of {longest} or less"
        )


def tokenize_documents(
    tokenizer: Any, documents: Sequence[str], joiner: str, *, special: bool = False
) -> tuple[list[int], NDArray[np.int64] | None]:
    """The tokens of the joined documents, and the number of the document in which each of them begins.

    The latter is None where the tokenizer does not say. `special`: with the special tokens that it adds to a text.
    """
    text = joiner.join(documents)
    if not getattr(tokenizer, "is_fast", False):
        return _tokenize(tokenizer, text, special=special), None
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    begins = np.array([begin for begin, _ in encoded["offset_mapping"]], dtype=np.int64)
    ends = np.array(list(accumulate(len(document) + len(joiner) for document in documents)), dtype=np.int64)
    # A token that begins in the joiner belongs to the document before it.
    return list(encoded["input_ids"]), np.searchsorted(ends, begins, side="right")


def _tokenize(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    # verbose=False: the text is meant to be longer than the model's context.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _bos_token(tokenizer: Any, bos: bool | Literal["auto"]) -> int | None:
    """The token that begins every window. BERT's [CLS] is one: the tokenizer is asked, not its attributes."""
    if bos is False:
        return None
    leading = leading_tokens(tokenizer)
    if len(leading) > 1:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(leading)))
        raise EvalError(
            f"the tokenizer begins a text with {len(leading)} special tokens ({names}), and a window has "
            "place for one; use bos=False"
        )
    if leading:
        return leading[0]
    if bos == "auto":
        return None
    for name in ("bos_token_id", "cls_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    raise EvalError("bos=True, but the tokenizer has neither a BOS nor a [CLS] token; use 'auto' or False")


def leading_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    probe = "the"
    bare = _tokenize(tokenizer, probe, special=False)
    framed = _tokenize(tokenizer, probe, special=True)
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start]
    return []
