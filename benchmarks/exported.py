"""One quantized model, as it is and exported, each loaded by the format's own loader in its own process.

    python benchmarks/exported.py DIR TEXT NAME=PATH... [--windows 2] [--length 1024] [--tokens 0]

`NAME` says who loads: quantlab (`quantlab.load`), transformers (plain `from_pretrained`, nothing of quantlab imported),
transformers-gguf (`from_pretrained(gguf_file=...)`), transformers-gptq (`from_pretrained` by way of optimum and
GPTQModel's plain kernel), llama.cpp (`llama_cpp`; both of an optional installation). All score the same token ids, in
float32 where the loader lets one choose. With `--tokens` also: how many greedy tokens after a few prompts are the same,
each loader being given the prompt and our own tokens before.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompts import PROMPTS

LOADERS = ("quantlab", "transformers", "transformers-gguf", "transformers-gptq", "llama.cpp")


@dataclass(frozen=True)
class Line:
    """What one loader said.

    Attributes:
        loader: its name.
        path: what it loaded.
        perplexity: of the windows; NaN if it failed.
        tokens: its likeliest token at each place of our own continuations.
        error: why it failed; empty if it did not.
    """

    loader: str
    path: str
    perplexity: float = math.nan
    tokens: tuple[tuple[int, ...], ...] = ()
    error: str = ""

    def beside(self, ours: Line) -> str:
        """For a person: the perplexity, and how far it is from ours."""
        if self.error:
            return f"{self.loader:18} {self.path}: {self.error}"
        moved = f"{100 * (self.perplexity / ours.perplexity - 1):+.4f} %"
        pairs = [
            a == b
            for mine, other in zip(ours.tokens, self.tokens, strict=True)
            for a, b in zip(mine, other, strict=True)
        ]
        same = f"  {sum(pairs)} of {len(pairs)} tokens" if pairs else ""
        return f"{self.loader:18} {self.perplexity:.4f}  {moved}{same}  {self.path}"


def compare(
    folder: str, exported: Iterable[tuple[str, str]], windows: list[list[int]], prompts: list[list[int]], tokens: int
) -> Iterator[Line]:
    """Ours first, then each loader's line.

    Args:
        folder: what quantlab wrote.
        exported: loaders and what they load.
        windows: token ids, whose perplexity is taken over every token but a window's first.
        prompts: token ids, whose greedy continuations are compared.
        tokens: how many of each.
    """
    request: dict[str, Any] = {"windows": windows, "prompts": prompts if tokens else [], "tokens": tokens}
    for loader, path in [("quantlab", folder), *exported]:
        command = [sys.executable, __file__, "--answer", loader, path]
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
        if done.returncode:
            yield Line(loader, path, error=(done.stderr.strip().splitlines() or ["no word"])[-1])
            continue
        answer = json.loads(done.stdout.splitlines()[-1])
        line = Line(loader, path, answer["perplexity"], tuple(map(tuple, answer["tokens"])))
        request.setdefault("track", answer["tokens"])
        yield line


def answer(loader: str, path: str, request: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: load, score the windows, and name the likeliest tokens after the prompts."""
    import torch

    length = max(map(len, request["windows"]))
    logits_of = _llama_cpp(path, length) if loader == "llama.cpp" else _transformers(loader, path)
    total = 0.0
    with torch.no_grad():
        for ids in request["windows"]:
            logprobs = logits_of(ids)[:-1].double().log_softmax(-1)
            total -= float(logprobs.gather(1, torch.tensor(ids[1:])[:, None]).sum())
        tokens = []
        for index, prompt in enumerate(request["prompts"]):
            track = list(request["track"][index]) if "track" in request else []
            while len(track) < request["tokens"]:  # ours alone, which go first
                track.append(int(logits_of(prompt + track)[-1].argmax()))
            tokens.append(logits_of(prompt + track[:-1])[len(prompt) - 1 :].argmax(-1).tolist())
    return {"perplexity": math.exp(total / sum(len(ids) - 1 for ids in request["windows"])), "tokens": tokens}


def _llama_cpp(path: str, length: int) -> Callable[[list[int]], Any]:
    import torch
    from llama_cpp import Llama

    llama = Llama(path, n_ctx=length, n_batch=length, logits_all=True, verbose=False, n_threads=1)

    def logits_of(ids: list[int]) -> Any:
        llama.reset()
        llama.eval(ids)
        return torch.from_numpy(llama.scores[: len(ids)].copy())

    return logits_of


def _transformers(loader: str, path: str) -> Callable[[list[int]], Any]:
    import torch
    from transformers import AutoModelForCausalLM

    if loader == "quantlab":
        import quantlab

        model = quantlab.load(path, dtype=torch.float32)
    elif loader == "transformers":
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    elif loader == "transformers-gptq":
        from transformers import GPTQConfig

        torch.compiler.set_stance("force_eager")  # compiling every layer takes minutes
        plain = GPTQConfig(bits=4, backend="gptq_torch")  # the bits are the folder's
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=plain).eval()
    else:
        file = Path(path)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    return lambda ids: model(torch.tensor([ids])).logits[0]


def tokens_of(folder: str, text: str, count: int, length: int) -> tuple[list[list[int]], list[list[int]]]:
    """The first windows of a text file, and the prompts, as a folder's tokenizer has them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(Path(text).read_text()[: 8 * count * length])["input_ids"]
    windows = [ids[i * length : (i + 1) * length] for i in range(count)]
    return windows, [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def main() -> None:
    if sys.argv[1:2] == ["--answer"]:
        print(json.dumps(answer(sys.argv[2], sys.argv[3], json.load(sys.stdin))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("text")
    parser.add_argument("exported", nargs="*", metavar="NAME=PATH", help=f"NAME is one of {', '.join(LOADERS)}")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=0)
    options = parser.parse_args()
    exported = [(name, path) for name, _, path in (entry.partition("=") for entry in options.exported)]
    windows, prompts = tokens_of(options.folder, options.text, options.windows, options.length)
    ours = None
    for line in compare(options.folder, exported, windows, prompts, options.tokens):
        ours = ours or line
        print(line.beside(ours), flush=True)


if __name__ == "__main__":
    main()
