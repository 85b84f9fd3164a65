"""Quantize one model by some recipes and measure each: perplexity relative to the original, CPU seconds, peak memory.

    python benchmarks/quality.py MODEL --calibrate TEXT --measure TEXT --recipe w4-gptq --recipe w3-gptq [--threads 1]

Each recipe runs in a process of its own; its CPU seconds are those of the whole process, imports included, and its peak
memory is above what importing torch and transformers takes. Calibrate on one text, measure on another.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("--calibrate", required=True)
    options.add_argument("--measure", required=True)
    options.add_argument("--recipe", action="append", required=True)
    options.add_argument("--samples", type=int, default=64)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--windows", type=int, default=16)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--only-quantize", action="store_true", help="Time and memory, no perplexity.")
    options.add_argument("--child", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.child:
        print(json.dumps(quantize(chosen)))
        return
    original = None if chosen.only_quantize else perplexity(chosen, chosen.model)
    if original:
        print(f"{'original':14} perplexity {original:.3f}", flush=True)
    for recipe in chosen.recipe:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", f"{recipe}={folder}/out"]
            figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            line = f"{recipe:14} {figures['bits']:.3f} bits  {figures['cpu']:.0f} CPU s  {figures['peak']:.0f} MB"
            if original:
                found = perplexity(chosen, f"{folder}/out")
                line += f"  perplexity {found:.3f}  x {found / original:.4f}"
            print(line, flush=True)


def quantize(chosen: argparse.Namespace) -> dict[str, float]:
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(chosen.threads)
    base = memory("VmRSS")
    import quantlab

    recipe, _, out = chosen.child.partition("=")
    settings = {"source": chosen.calibrate, "samples": chosen.samples, "length": chosen.length}
    result = quantlab.quantize(
        chosen.model, recipe, Path(out), overrides=[f"calibration.{key}={value}" for key, value in settings.items()]
    )
    return {"bits": result.bits, "cpu": time.process_time(), "peak": memory("VmHWM") - base}


def perplexity(chosen: argparse.Namespace, model: str) -> float:
    import torch

    import quantlab

    torch.set_num_threads(chosen.threads)
    return quantlab.evaluate(model, chosen.measure, length=2048, windows=chosen.windows).perplexity.perplexity


def memory(key: str) -> float:
    """A figure of /proc/self/status, in MB."""
    found = re.search(key + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


if __name__ == "__main__":
    main()
