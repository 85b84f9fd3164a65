"""Summaries that a model writes, against those that people wrote: ROUGE, by the library rouge-score."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .bootstrap import ClusterMeans, Interval
from .errors import EvalError
from .generation import Sampling, generate
from .logits import Progress, describe_model

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
DOCUMENT = "{document}"
TEMPLATES = {"encoder-decoder": DOCUMENT, "causal": f"{DOCUMENT}\n\nTL;DR:"}
"""What a model is asked where nothing else is said."""


@dataclass(frozen=True)
class SummaryPair:
    """A document and the summary that a person wrote of it."""

    document: str
    summary: str


@dataclass(frozen=True)
class Summaries:
    """What was written and how it scores.

    Attributes:
        rouge: mean F1 by kind (Lin 2004, aclanthology W04-1013): of words, of pairs of words, of longest common
            subsequences, and of these sentence by sentence (a line is a sentence).
        intervals: 95 % bootstrap intervals over documents; None for a single one.
        each: F1 of each document, for a paired comparison with another model (`compare`).
        texts: the summaries.
        shortened: documents that were cut to fit into the model's positions.
        settings: every choice that was made.
    """

    rouge: Mapping[str, float]
    intervals: Mapping[str, Interval | None]
    each: Mapping[str, ClusterMeans]
    texts: tuple[str, ...]
    shortened: int
    settings: Mapping[str, Any]


def load_pairs(path: str | Path, *, document: str = "document", summary: str = "summary") -> list[SummaryPair]:
    """Read documents and summaries from a file of JSON lines, by the names of the two fields.

    Raises `EvalError` if there are none, or a line lacks one of them.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"{path}: cannot be read ({error}); give a file of JSON lines") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pair = SummaryPair(row[document], row[summary])
        except (ValueError, KeyError, TypeError) as error:
            raise EvalError(
                f"{path}, line {number}: no JSON object with the fields {document!r} and {summary!r} ({error})"
            ) from error
        if not (isinstance(pair.document, str) and isinstance(pair.summary, str) and pair.document.strip()):
            raise EvalError(
                f"{path}, line {number}: {document!r} and {summary!r} must be text, and the first not empty"
            )
        pairs.append(pair)
    if not pairs:
        raise EvalError(f"{path}: there is no document in it")
    return pairs


def summarize_documents(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[SummaryPair],
    *,
    template: str | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Summaries:
    """Let a causal or encoder-decoder model summarize documents, and score what it writes.

    A document that is too long for the model is cut at its end. From a causal model's answer the first paragraph
    is taken.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        pairs: documents with summaries.
        template: what it reads, with ``{document}`` in it; None: one of `TEMPLATES`.
        sampling: None: the likeliest token, 128 at most.
        seed: document ``i`` is answered with ``seed + i``.
        progress: told after each document.

    Raises:
        EvalError: rouge-score is not installed, the template has no place for the document, or it fills the
            model's positions by itself.
    """
    score = rouge_scorer()
    config = getattr(model, "config", None)
    reads_and_writes = bool(getattr(config, "is_encoder_decoder", False))
    template = TEMPLATES["encoder-decoder" if reads_and_writes else "causal"] if template is None else template
    if template.count(DOCUMENT) != 1:
        raise EvalError(f"template {template!r}: it needs one place for the document, {DOCUMENT}")
    sampling = sampling or Sampling()
    room = _room(config, 0 if reads_and_writes else sampling.max_new_tokens)
    texts, found, shortened = [], [], 0
    for index, pair in enumerate(pairs):
        prompt, cut = _prompt(tokenizer, template, pair.document, room)
        shortened += cut
        (tokens,) = generate(model, prompt, sampling, seed=seed + index)
        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        texts.append(text if reads_and_writes else text.partition("\n\n")[0])
        found.append(score(pair.summary, texts[-1]))
        if progress is not None:
            progress(index + 1, len(pairs))
    each = {
        kind: ClusterMeans("documents", (1,) * len(found), tuple(scores[kind] for scores in found)) for kind in KINDS
    }
    return Summaries(
        rouge={kind: scores.mean for kind, scores in each.items()},
        intervals={kind: scores.interval() for kind, scores in each.items()},
        each=each,
        texts=tuple(texts),
        shortened=shortened,
        settings={"template": template, **vars(sampling), "seed": seed, "stemmed": True, **describe_model(model)},
    )


def rouge_scorer() -> Callable[[str, str], dict[str, float]]:
    """A function of the text that was wanted and the one that was written: F1 by kind.

    Raises `EvalError` if rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise EvalError(
            f"ROUGE is computed by rouge-score, which is not installed here ({error}): pip install 'quantlab[eval]'"
        ) from error
    scorer = RougeScorer(list(KINDS), use_stemmer=True)
    return lambda wanted, written: {kind: found.fmeasure for kind, found in scorer.score(wanted, written).items()}


def _room(config: Any, new_tokens: int) -> int | None:
    """Tokens that a prompt may have."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    return positions - new_tokens if isinstance(positions, int) and positions > 0 else None


def _prompt(tokenizer: Any, template: str, document: str, room: int | None) -> tuple[list[int], bool]:
    """The tokens of a prompt, and whether the document had to be cut."""
    tokens = list(tokenizer(template.replace(DOCUMENT, document), verbose=False)["input_ids"])
    if room is None or len(tokens) <= room:
        return tokens, False
    inner = list(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
    while len(tokens) > room:
        # Cut as text, so that the template around it is tokenized as it stands; a few tokens may go either way.
        inner = inner[: len(inner) - max(1, len(tokens) - room)]
        if not inner:
            raise EvalError(f"the template alone takes more than the {room} tokens that the model has for a prompt")
        tokens = list(tokenizer(template.replace(DOCUMENT, tokenizer.decode(inner)), verbose=False)["input_ids"])
    return tokens, True
