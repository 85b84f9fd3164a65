"""What making a quantized weight costs, by the compiled kernels and by torch's own operations: nanoseconds a weight.

python benchmarks/quantizing.py [--shape 4096x4096] [--format int4 nf4] [--group 64] [--rounds 3]

Both take turns in one process, one thread; the median of the rounds in seconds of a processor.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import torch
from quantlab_kernels import pack, quantizing

from quantlab.numerics import QTensor, apply_scales, choose_scales, grid


def steps(weight: torch.Tensor, name: str, group: int) -> dict[str, Callable[[], object]]:
    """What is timed, by what it is."""
    table, importance = grid(name), torch.rand(weight.shape[1]) + 0.1
    scales = choose_scales(weight, table, group, search=False)
    codes = apply_scales(weight, table, scales)
    made = QTensor.of(codes, scales, table)

    def errors() -> object:
        found = made.row_errors(weight, None)
        if found is None:  # as the engine does without a kernel
            found = [(weight[rows].float() - part).square_().sum(1) for rows, part in made.decoded_rows()]
        return found

    return {
        "abs-max scales": lambda: choose_scales(weight, table, group, search=False),
        "searched scales": lambda: choose_scales(weight, table, group),
        "under a second moment": lambda: choose_scales(weight, table, group, importance=importance),
        "codes": lambda: apply_scales(weight, table, scales),
        "errors": errors,
        "packing": lambda: pack(codes, table.bits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096")
    parser.add_argument("--format", nargs="+", default=["int4", "int3", "int8", "nf4", "e2m3"])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, columns = map(int, arguments.shape.split("x"))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    ways = {True: nullcontext(), False: mock.patch.object(quantizing, "_has_kernel", return_value=False)}
    print(f"{'':8}{'':24}{'compiled':>10}{'torch':>10}{'ratio':>8}   ns a weight, {arguments.shape} bfloat16")
    for name in arguments.format:
        for what, step in steps(weight, name, arguments.group).items():
            taken: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(arguments.rounds):
                for compiled, times in taken.items():
                    with ways[compiled]:
                        started = time.process_time()
                        step()
                        times.append(time.process_time() - started)
            ours, theirs = (statistics.median(times) * 1e9 / weight.numel() for times in taken.values())
            print(f"{name:8}{what:24}{ours:10.2f}{theirs:10.2f}{theirs / ours:8.1f}", flush=True)


if __name__ == "__main__":
    main()
