"""Perplexity of one quantized model, as it is and exported, each loaded by the format's own loader in its own process.

    python benchmarks/exported.py DIR TEXT NAME=PATH... [--windows 2] [--length 1024]

`NAME` says who loads: quantlab (`quantlab.load`), transformers (plain `from_pretrained`, nothing of quantlab imported),
transformers-gguf (`from_pretrained(gguf_file=...)`), transformers-gptq (`from_pretrained` by way of optimum and
GPTQModel's plain kernel), llama.cpp (`llama_cpp`; both of an optional installation). All score the same token ids, in
float32 where the loader lets one choose.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

_LOADERS = ("quantlab", "transformers", "transformers-gguf", "transformers-gptq", "llama.cpp")


def score(name: str, path: str, windows: list[list[int]]) -> float:
    """Perplexity of the windows: every token but a window's first."""
    import torch

    if name == "llama.cpp":
        from llama_cpp import Llama

        llama = Llama(path, n_ctx=len(windows[0]), n_batch=len(windows[0]), logits_all=True, verbose=False, n_threads=1)
        total = 0.0
        for ids in windows:
            llama.reset()
            llama.eval(ids)
            logprobs = torch.from_numpy(llama.scores[: len(ids) - 1]).double().log_softmax(-1)
            total -= float(logprobs.gather(1, torch.tensor(ids[1:])[:, None]).sum())
        return float(torch.tensor(total / sum(len(ids) - 1 for ids in windows)).exp())
    from transformers import AutoModelForCausalLM

    if name == "quantlab":
        import quantlab

        model = quantlab.load(path, dtype=torch.float32)
    elif name == "transformers":
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    elif name == "transformers-gptq":
        from transformers import GPTQConfig

        torch.compiler.set_stance("force_eager")  # compiling every layer takes minutes
        plain = GPTQConfig(bits=4, backend="gptq_torch")  # the bits are the folder's
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=plain).eval()
    else:
        file = Path(path)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    total = 0.0
    with torch.no_grad():
        for ids in windows:
            logprobs = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
            total -= float(logprobs.gather(1, torch.tensor(ids[1:])[:, None]).sum())
    return float(torch.tensor(total / sum(len(ids) - 1 for ids in windows)).exp())


def main() -> None:
    if sys.argv[1] == "--score":
        print(json.dumps(score(sys.argv[2], sys.argv[3], json.load(sys.stdin))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("text")
    parser.add_argument("exported", nargs="*", metavar="NAME=PATH", help=f"NAME is one of {', '.join(_LOADERS)}")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    options = parser.parse_args()
    from transformers import AutoTokenizer

    text = Path(options.text).read_text()[: 8 * options.windows * options.length]
    ids = AutoTokenizer.from_pretrained(options.folder)(text)["input_ids"]
    windows = [ids[i * options.length : (i + 1) * options.length] for i in range(options.windows)]
    first = None
    for entry in [f"quantlab={options.folder}", *options.exported]:
        name, _, path = entry.partition("=")
        command = [sys.executable, __file__, "--score", name, path]
        done = subprocess.run(command, input=json.dumps(windows), capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name:18} {path}: {done.stderr.strip().splitlines()[-1]}")
            continue
        value = json.loads(done.stdout.splitlines()[-1])
        first = first or value
        print(f"{name:18} {value:.4f}  {100 * (value / first - 1):+.4f} %  {path}", flush=True)


if __name__ == "__main__":
    main()
