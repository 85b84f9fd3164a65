"""What it costs to know an original by a record: mean KL against the truth, by what is kept of each position.

    python benchmarks/recorded_reference.py ORIGINAL VARIANT [VARIANT ...] --text wikitext2.test.txt

Compares whole distributions with the likeliest tokens and one number for all others, and with the likeliest tokens and
a sample of the others.
"""

from __future__ import annotations

import argparse

import torch
from quantlab_evals import Windows, load_documents, token_windows
from quantlab_evals.recorded import expected_log_ratio, sampled_divergence
from quantlab_evals.reference import kl_divergence
from torch import Tensor
from transformers import AutoTokenizer

import quantlab


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("original")
    options.add_argument("variants", nargs="+")
    options.add_argument("--text", required=True)
    options.add_argument("--windows", type=int, default=4)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    tokenizer = AutoTokenizer.from_pretrained(chosen.original)
    windows = token_windows(tokenizer, load_documents(chosen.text), chosen.length, limit=chosen.windows)
    log_p = log_probabilities(chosen.original, windows)
    for variant in chosen.variants:
        log_q = log_probabilities(variant, windows)
        exact = kl_divergence(log_p, log_q)
        print(f"{variant}: mean KL {exact.mean():.5f} at {len(exact)} positions")
        for top_k, sampled in ((256, 0), (1024, 0), (4096, 0), (128, 64), (256, 128), (256, 256)):
            difference = estimate(log_p, log_q, top_k, sampled) - exact
            error = difference.std() / len(difference) ** 0.5
            kept = f"{top_k} tokens, " + (f"{sampled} drawn" if sampled else "the others as one")
            print(f"  {kept:32} {difference.mean():+.5f} +- {error:.5f}  {difference.mean() / exact.mean():+.2%}")


def log_probabilities(model: str, windows: Windows) -> Tensor:
    loaded = quantlab.load(model)
    with torch.no_grad():
        return torch.cat([loaded(row[None]).logits[0, :-1].float().log_softmax(-1) for row in windows.tokens])


def estimate(log_p: Tensor, log_q: Tensor, top_k: int, sampled: int) -> Tensor:
    top, indices = log_p.topk(top_k)
    rest = log_p.scatter(-1, indices, -torch.inf)
    head, log_tail = expected_log_ratio(indices, top, log_q), rest.logsumexp(-1)
    if sampled:
        sample = rest.exp().multinomial(sampled, replacement=True, generator=torch.Generator().manual_seed(0))
        return sampled_divergence(head, log_tail, sample, log_p.gather(-1, sample), log_q)[0]
    return head + log_tail.exp() * (log_tail - log_q.scatter(-1, indices, -torch.inf).logsumexp(-1))


if __name__ == "__main__":
    main()
