"""``make gpu-check``, for a machine with a GPU: are the kernels right, and how near to what memory allows?

Every format and dtype is compared with float64 for 1 to 300 rows, several at a time, since most of it is compiling.
Then products are timed (``gpu_speed``) against cuBLAS in float16 and, where installed, gemlite and bitsandbytes.
The result is a JSON file that can be committed. Without a GPU it says so and exits with 2; with a wrong result, with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from quantlab_kernels.gpu import available
from quantlab_kernels.gpu.gpu_speed import FORMATS, GROUP, SHAPES, timings
from quantlab_kernels.gpu.gpu_speed import ROWS as TIMED_ROWS
from quantlab_kernels.gpu.subjects import Subject, Tensors, subjects

ROWS = (1, 2, 4, 8, 16, 17, 64, 300)
_W8A8 = {"w8a8-int8": torch.int8, "w8a8-e4m3": torch.float8_e4m3fn}


def errors(
    subject: Subject, dtype: torch.dtype, device: torch.device, rows: tuple[int, ...] = ROWS
) -> dict[str, float]:
    """How far products are from float64, as a share of all that is added up, and of what is allowed: 1 is the limit.

    The limit is the rounding of the result, of scales and weights to ``dtype``, and of 16-entry tables.
    """
    from quantlab_kernels.gpu import product

    found = {}
    for columns, group in ((1024, 128), (576, 64), (100, 100)):
        if columns // group > 1 and group % 32:
            continue
        tensors = Tensors.random(subject, 264, columns, group, device)
        weight = tensors.prepared(subject)
        allowed = 4 * torch.finfo(dtype).eps / 2
        for count in rows:
            x = torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(device, dtype)
            exact = x.double() @ tensors.weight.T
            size = x.double().abs() @ tensors.weight.abs().T
            share = (product(x, weight).double() - exact).abs() / (size * allowed)
            found[f"{columns}/{group}/{count}"] = float(share.max())
    return found


def errors_w8a8(kind: torch.dtype, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """As :func:`errors`, for 8-bit activations: what is compared is the product, not how activations are rounded."""
    from quantlab_kernels.activations import quantize_rows
    from quantlab_kernels.gpu.w8a8 import product_w8a8

    found = {}
    for outputs, columns in ((264, 1024), (130, 592)):
        generator = torch.Generator().manual_seed(0)
        weight, weight_scales = quantize_rows(torch.randn(outputs, columns, generator=generator).to(device), kind)
        exact_weight = weight.double() * weight_scales.double()[:, None]
        for count in ROWS:
            codes, scales = quantize_rows(torch.randn(count, columns, generator=generator).to(device), kind)
            x = codes.double() * scales.double()[:, None]
            y = product_w8a8(codes, scales, weight, weight_scales, None, dtype)
            size = x.abs() @ exact_weight.abs().T
            share = (y.double() - x @ exact_weight.T).abs() / (size * 4 * torch.finfo(dtype).eps / 2)
            found[f"{columns}/{count}"] = float(share.max())
    return found


def checked(name: str, dtype: torch.dtype, speed: bool) -> dict[str, float]:
    """:func:`errors` of the subject of that name. With ``speed``, the kernels that will be timed are compiled too."""
    from quantlab_kernels.gpu import product

    device = torch.device("cuda", torch.cuda.current_device())
    if name in _W8A8:
        return errors_w8a8(_W8A8[name], dtype, device)
    subject = next(one for one in subjects() if one.name == name)
    if speed and name in FORMATS and dtype == torch.float16:
        for outputs, columns in SHAPES:
            weight = Tensors.random(subject, outputs, columns, GROUP, device).prepared(subject)
            for count in TIMED_ROWS:
                product(torch.zeros(count, columns, dtype=dtype, device=device), weight)
    return errors(subject, dtype, device)


def all_checked(speed: bool, jobs: int) -> Iterator[tuple[str, dict[str, float]]]:
    """The errors of every format and dtype as they are known, under ``format/dtype``."""
    from quantlab_kernels.gpu.configs import device_of
    from quantlab_kernels.gpu.w8a8 import multiplies_e4m3

    names = [*(subject.name for subject in subjects()), "w8a8-int8"]
    if multiplies_e4m3(device_of(torch.device("cuda", torch.cuda.current_device())).architecture):
        names.append("w8a8-e4m3")
    cases = [(name, dtype) for name in names for dtype in (torch.float16, torch.bfloat16)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = [(name, dtype, pool.submit(checked, name, dtype, speed)) for name, dtype in cases]
        for name, dtype, found in waiting:
            yield f"{name}/{str(dtype).removeprefix('torch.')}", found.result()


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures hold for."""
    import triton

    from quantlab_kernels.gpu.configs import device_of

    return {
        **asdict(device_of(device)),
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver_runtime": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
    }


def write(path: Path, record: dict[str, Any]) -> None:
    """One JSON file, its floats cut to what was measured."""

    def cut(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}")
        if isinstance(value, dict):
            return {name: cut(one) for name, one in value.items()}
        return [cut(one) for one in value] if isinstance(value, list) else value

    path.write_text(json.dumps(cut(record), indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m quantlab_kernels.gpu.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="where the figures go")
    parser.add_argument("--no-timings", action="store_true", help="correctness alone")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile")
    options = parser.parse_args(arguments)
    answer = available()
    if not answer:
        print(f"gpu-check: nothing to check here: {answer.reason}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    record: dict[str, Any] = {"environment": environment(device), "errors": {}, "timings": []}
    worst = 0.0
    for name, found in all_checked(not options.no_timings, options.jobs):
        record["errors"][name] = max(found.values())
        worst = max(worst, *found.values())
        bad = [case for case, share in found.items() if not share <= 1]
        print(f"{name}: {'WRONG for ' + ', '.join(bad) if bad else 'right'}", flush=True)
        write(options.out, record)  # after each: what was found is not lost
    if not options.no_timings:
        for timing in timings(device):
            record["timings"].append(timing)
            print(json.dumps(timing), flush=True)
            write(options.out, record)
    print(f"written to {options.out}")
    return 0 if worst <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
