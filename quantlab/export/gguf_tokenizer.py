"""A tokenizer as GGUF's metadata: byte-level BPE (``gpt2``) and SentencePiece's BPE (``llama``).

Both are read from what every fast tokenizer can say of itself (the text of a ``tokenizer.json``), also where the model
came with a SentencePiece file: transformers converts that to merges, whose order stands for the scores.
"""

from __future__ import annotations

import json
from typing import Any

import gguf
from gguf import TokenType

from quantlab.errors import CheckpointError

_GPT2 = "byte-level"
# llama.cpp knows a way to cut text into words by a name; tokenizers know it by these steps.
_PRE_TOKENIZERS = {
    (_GPT2,): "gpt-2",
    ("digits", _GPT2): "smollm",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    ): "llama-bpe",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    ): "qwen2",
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
        r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    ): "tekken",
}


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, vocabulary: int, pre: str | None = None) -> None:
    """Tokens, merges or scores, special tokens and the chat template.

    Args:
        writer: of the file.
        tokenizer: transformers' fast tokenizer.
        vocabulary: rows of the model's embedding; rows without a token get one that is never made.
        pre: what llama.cpp calls the way in which text is cut into words; None: it is recognized.

    Raises:
        CheckpointError: another kind of tokenizer, or a way to cut text that is not recognized.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(f"{type(tokenizer).__name__}: only tokenizers with a tokenizer.json can be exported")
    data = json.loads(backend.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise CheckpointError(f"a tokenizer of the kind {model['type']} has no export to GGUF yet; only BPE has")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    ids = {index: text for text, index in model["vocab"].items()}
    added = {entry["id"]: entry for entry in data.get("added_tokens") or []}
    ids |= {index: entry["content"] for index, entry in added.items()}
    if too_many := [index for index in ids if index >= vocabulary]:
        raise CheckpointError(f"token {max(too_many)}: the model's embedding has {vocabulary} rows only")
    pieces = model.get("byte_fallback", False)
    tokens = [ids.get(index, f"[PAD{index}]") for index in range(vocabulary)]
    types = [_type(index, ids, added, model.get("unk_token"), pieces) for index in range(vocabulary)]
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else pre or _pre_tokenizer(data))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if pieces:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_adds_space(data))
    else:
        writer.add_token_merges([" ".join(part.replace(" ", "Ġ") for part in merge) for merge in merges])
    _add_special(writer, tokenizer)


def _type(index: int, ids: dict[int, str], added: dict[int, Any], unknown: str | None, pieces: bool) -> TokenType:
    if index not in ids:
        return TokenType.UNUSED
    if ids[index] == unknown:
        return TokenType.UNKNOWN if pieces else TokenType.CONTROL
    if index in added:
        return TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
    text = ids[index]
    is_byte = pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece merges the pair whose piece has the highest score: the earlier a merge, the higher."""
    rank: dict[str, int] = {}
    for order, (left, right) in enumerate(merges):
        rank.setdefault(left + right, order)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _steps(node: Any) -> list[str]:
    """A pre-tokenizer as the names and patterns of what it does, in order."""
    if node is None:
        return []
    kind = node["type"]
    if kind == "Sequence":
        return [step for part in node["pretokenizers"] for step in _steps(part)]
    if kind == "Split":
        return [node["pattern"].get("Regex", node["pattern"].get("String", ""))]
    if kind == "Digits":
        return ["digits" if node["individual_digits"] else "numbers"]
    if kind == "ByteLevel":
        return [_GPT2] if node.get("use_regex", True) else []
    return [kind]


def _pre_tokenizer(data: dict[str, Any]) -> str:
    steps = tuple(_steps(data.get("pre_tokenizer")))
    if steps not in _PRE_TOKENIZERS:
        raise CheckpointError(
            "the tokenizer cuts text into words in a way that quantlab has no llama.cpp name for "
            f"({' then '.join(steps)}); say it with --set pre=NAME, as llama.cpp's converter lists them"
        )
    return _PRE_TOKENIZERS[steps]


def _adds_space(data: dict[str, Any]) -> bool:
    """Whether a text is begun with a space, as Llama 2 does and Gemma does not."""
    text = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _add_special(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    for name in ("bos", "eos", "unk", "sep", "pad", "mask"):
        if (index := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        template = tokenizer.chat_template
        named = template if isinstance(template, str) else [{"name": k, "template": t} for k, t in template.items()]
        writer.add_chat_template(named)
