"""``make gpu-check``, for a machine with a GPU: are the kernels right, and how near to what memory allows?

Every format and dtype is compared with float64 for 1 to 300 rows; then products are timed with CUDA events against
cuBLAS in float16 and, where they are installed, gemlite and bitsandbytes. The result is a JSON file that can be
committed. Without a GPU it says so and exits with 2; with a wrong result, with 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantlab_kernels.gpu import available
from quantlab_kernels.packing import pack, packed_width

ROWS = (1, 2, 4, 8, 16, 17, 64, 300)
TIMED_ROWS = (1, 4, 16, 128, 2048)
SHAPES = ((4096, 4096), (11008, 4096))
_NF4 = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0)
_NF4_UP = (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0)


@dataclass(frozen=True)
class Subject:
    """A format as a stored layer has it.

    Attributes:
        name: of the format.
        bits: width of a code.
        offset: of an integer format, or None.
        entries: of the table.
        zeros: whether groups have zeros.
    """

    name: str
    bits: int
    offset: int | None
    entries: tuple[float, ...]
    zeros: bool = False

    @property
    def table(self) -> torch.Tensor:
        """Float32."""
        return torch.tensor(self.entries)


def subjects() -> Iterator[Subject]:
    """Everything that is shipped, by what a checkpoint would hold."""
    from quantlab_kernels.gpu.formats import minifloat_table

    for bits in range(2, 9):
        for zeros in (False, True):
            lowest = -(1 << (bits - 1))
            name = f"int{bits}" + ("-zeros" if zeros else "")
            yield Subject(name, bits, lowest, tuple(map(float, range(lowest, -lowest))), zeros)
    for name, exponent, mantissa in (("e3m2", 3, 2), ("e2m3", 2, 3)):
        yield Subject(name, 6, None, tuple(minifloat_table(exponent, mantissa).tolist()))
    yield Subject("nf4", 4, None, _NF4 + _NF4_UP)
    curve = torch.linspace(-1, 1, 63, dtype=torch.float64)
    yield Subject("power6", 6, None, tuple((curve.sign() * curve.abs() ** 2.5).tolist()))


@dataclass(frozen=True)
class Tensors:
    """A random layer of a subject, as stored."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    weight: torch.Tensor  # float64, what they mean

    @classmethod
    def random(cls, subject: Subject, rows: int, columns: int, group: int, device: torch.device) -> Tensors:
        """``[rows, columns]`` of uniform codes."""
        generator = torch.Generator().manual_seed(0)
        table = subject.table
        codes = torch.randint(0, len(table), (rows, columns), generator=generator).to(torch.uint8)
        scales = (torch.rand(rows, columns // group, generator=generator) + 0.1) / 64
        zeros = torch.randint(-2, 3, scales.shape, generator=generator).to(torch.int8) if subject.zeros else None
        values = table.double()[codes.long()].unflatten(1, (-1, group))
        if zeros is not None:
            values = values - zeros.double().unsqueeze(-1)
        weight = (values * scales.double().unsqueeze(-1)).flatten(1)
        stored = pack(codes, subject.bits), scales.half(), zeros
        exact = weight * (scales.half().double() / scales.double()).repeat_interleave(group, 1)
        return cls(*(None if t is None else t.to(device) for t in (*stored, exact)))  # type: ignore[arg-type]


def errors(
    subject: Subject, dtype: torch.dtype, device: torch.device, rows: tuple[int, ...] = ROWS
) -> dict[str, float]:
    """How far products are from float64, as a share of all that is added up, and of what is allowed: 1 is the limit.

    The limit is the rounding of the result, of scales and weights to ``dtype``, and of 16-entry tables.
    """
    from quantlab_kernels.gpu import prepare, product

    found = {}
    for columns, group in ((1024, 128), (576, 64), (100, 100)):
        if columns // group > 1 and group % 32:
            continue
        tensors = Tensors.random(subject, 264, columns, group, device)
        weight = prepare(
            tensors.codes, tensors.scales, tensors.zeros, subject.table, subject.bits, subject.offset, columns
        )
        allowed = 4 * torch.finfo(dtype).eps / 2
        for count in rows:
            x = torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(device, dtype)
            exact = x.double() @ tensors.weight.T
            size = x.double().abs() @ tensors.weight.abs().T
            share = (product(x, weight).double() - exact).abs() / (size * allowed)
            found[f"{columns}/{group}/{count}"] = float(share.max())
    return found


# --- speed ---


def traffic(subject: Subject, rows: int, outputs: int, columns: int, group: int) -> int:
    """Bytes that a product must read and write: codes, 16-bit scales, zeros, activations and results."""
    groups = outputs * columns // group
    weight = outputs * packed_width(columns, subject.bits) + groups * (2 + subject.zeros)
    return weight + 2 * rows * (columns + outputs)


def share_of_roofline(milliseconds: float, read: int, bandwidth: float) -> float:
    """The time that ``read`` bytes take at ``bandwidth`` bytes a second, as a share of the time that it took."""
    return read / bandwidth / (milliseconds / 1e3)


def stream_bandwidth(device: torch.device, time: Callable[[Callable[[], object]], float]) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (time(lambda: target.copy_(source)) / 1e3)


def peers(
    subject: Subject, outputs: int, columns: int, device: torch.device
) -> dict[str, Callable[[torch.Tensor], Any]]:
    """Other implementations of the same product that are installed, as functions of the activations."""
    found: dict[str, Callable[[torch.Tensor], Any]] = {}
    dense = torch.randn(outputs, columns, dtype=torch.float16, device=device) / 64
    found["cublas-f16"] = lambda x: torch.nn.functional.linear(x, dense)
    if subject.name in ("int2", "int4", "int8") and importlib.util.find_spec("gemlite"):
        found["gemlite"] = _gemlite(subject.bits, outputs, columns)
    if subject.name == "nf4" and importlib.util.find_spec("bitsandbytes"):
        found["bitsandbytes"] = _bitsandbytes(dense)
    return found


def _gemlite(bits: int, outputs: int, columns: int) -> Callable[[torch.Tensor], Any]:
    from gemlite.core import DType, GemLiteLinearTriton

    layer = GemLiteLinearTriton(
        bits, group_size=128, in_features=columns, out_features=outputs, input_dtype=DType.FP16, output_dtype=DType.FP16
    )
    codes = torch.randint(0, 1 << bits, (outputs, columns), device="cuda").to(torch.uint8)
    scales = torch.full((outputs * columns // 128, 1), 1 / 64, dtype=torch.float16, device="cuda")
    layer.pack(codes, scales, scales * (32 << bits), None)
    return layer


def _bitsandbytes(dense: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    import bitsandbytes

    quantized, state = bitsandbytes.functional.quantize_4bit(dense, blocksize=128, quant_type="nf4")
    return lambda x: bitsandbytes.matmul_4bit(x, quantized.t(), quant_state=state)


def timings(
    device: torch.device,
    shapes: tuple[tuple[int, int], ...],
    rows: tuple[int, ...],
    time: Callable[[Callable[[], object]], float],
) -> Iterator[dict[str, Any]]:
    """A record for each format, shape and number of rows: milliseconds of ours and of each peer, share of the roofline.

    Args:
        device: where.
        shapes: ``(outputs, inputs)``.
        rows: of activations.
        time: median milliseconds of a call, with caches emptied between calls.
    """
    from quantlab_kernels.gpu import prepare, product

    bandwidth = stream_bandwidth(device, time)
    yield {"stream_bytes_per_second": bandwidth}
    chosen = {"int2", "int3", "int4", "int4-zeros", "int8", "e3m2", "nf4", "power6"}
    for subject in subjects():
        if subject.name not in chosen:
            continue
        for outputs, columns in shapes:
            tensors = Tensors.random(subject, outputs, columns, 128, device)
            stored = tensors.codes, tensors.scales, tensors.zeros
            weight = prepare(*stored, subject.table, subject.bits, subject.offset, columns)
            others = peers(subject, outputs, columns, device)
            for count in rows:
                x = torch.randn(count, columns, dtype=torch.float16, device=device)
                ours = time(lambda x=x, weight=weight: product(x, weight))  # type: ignore[misc]
                read = traffic(subject, count, outputs, columns, 128)
                yield {
                    "format": subject.name,
                    "shape": [outputs, columns],
                    "rows": count,
                    "milliseconds": ours,
                    "roofline": share_of_roofline(ours, read, bandwidth),
                    **{name: time(lambda x=x, call=call: call(x)) for name, call in others.items()},  # type: ignore[misc]
                }


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
    options = parser.parse_args(arguments)
    answer = available()
    if not answer:
        print(f"gpu-check: nothing to check here: {answer.reason}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    record: dict[str, Any] = {"environment": environment(device), "errors": {}, "timings": []}
    worst = 0.0
    for subject in subjects():
        for dtype in (torch.float16, torch.bfloat16):
            found = errors(subject, dtype, device)
            name = f"{subject.name}/{str(dtype).removeprefix('torch.')}"
            record["errors"][name] = max(found.values())
            worst = max(worst, *found.values())
            bad = [case for case, share in found.items() if not share <= 1]
            print(f"{name}: {'WRONG for ' + ', '.join(bad) if bad else 'right'}", flush=True)
    if not options.no_timings:
        from triton.testing import do_bench

        def time(call: Callable[[], object]) -> float:
            return do_bench(call, warmup=25, rep=200, return_mode="median")

        for timing in timings(device, SHAPES, TIMED_ROWS, time):
            record["timings"].append(timing)
            print(json.dumps(timing), flush=True)
    write(options.out, record)
    print(f"written to {options.out}")
    return 0 if worst <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
