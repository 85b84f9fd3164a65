"""Does llama.cpp make the same tokens of an exported GGUF file as our own model does?

    pip install llama-cpp-python
    python benchmarks/gguf_llamacpp.py DIR FILE.gguf [--tokens 48]

Greedy continuations of a few prompts, token by token, and the prompts' own tokens by both tokenizers. llama.cpp rounds
activations to 8 bits for its products, so that a near tie can fall to the other side: where the two part, the margin
that our model had between its two likeliest tokens is shown, and llama.cpp is set back on our track, so that every
position is compared given the same text.
"""

from __future__ import annotations

import argparse
import json

import prompts
import torch
from transformers import AutoTokenizer

import quantlab

# Beside these, text that tokenizers take apart in their own ways.
PROMPTS = (*prompts.PROMPTS, "Été 2024: naïve   spaces, don't they?")


def ours(model: torch.nn.Module, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens, and by how much (in nats) each was likelier than the next."""
    found, margins = [], []
    with torch.no_grad():
        done = model(torch.tensor([ids]), use_cache=True)
        for _ in range(count):
            best = done.logits[0, -1].float().topk(2)
            found.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            done = model(torch.tensor([[found[-1]]]), past_key_values=done.past_key_values, use_cache=True)
    return found, margins


def theirs(llama: object, ids: list[int], track: list[int]) -> list[int]:
    """llama.cpp's likeliest token at each position of our track."""
    import numpy as np

    llama.reset()  # type: ignore[attr-defined]
    llama.eval(ids + track[:-1])  # type: ignore[attr-defined]
    scores = llama.scores[len(ids) - 1 : len(ids) + len(track) - 1]  # type: ignore[attr-defined]
    return np.argmax(scores, axis=-1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="what `quantlab quantize` wrote")
    parser.add_argument("file", help="what `quantlab export --to gguf` made of it")
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    from llama_cpp import Llama

    model = quantlab.load(options.folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    llama = Llama(options.file, n_ctx=512, logits_all=True, verbose=False, n_threads=1)
    same = parted = tokens_differ = 0
    margins_of_parted = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        tokens_differ += llama.tokenize(prompt.encode(), add_bos=True, special=True) != ids
        track, margins = ours(model, ids, options.tokens)
        for mine, other, margin in zip(track, theirs(llama, ids, track), margins, strict=True):
            same += mine == other
            if mine != other:
                parted += 1
                margins_of_parted.append(round(margin, 4))
    print(
        json.dumps(
            {
                "prompts": len(PROMPTS),
                "prompts_tokenized_otherwise": tokens_differ,
                "tokens": same + parted,
                "same": same,
                "margins_where_they_part": margins_of_parted,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
