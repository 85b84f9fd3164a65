"""How long products take on a GPU, beside those of others, and how near that is to what memory allows.

One product of a few microseconds is shorter than the time in which it can be launched, and a weight of a few megabytes
stays in the cache of a large GPU. So a CUDA graph of many products is timed, each with the next of as many copies of
its weight as overflow the cache: what a decoder does, which goes through all its layers before it meets one again.
"""

from __future__ import annotations

import importlib.util
import statistics
import time as clock
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from quantlab_kernels.gpu.subjects import Subject, Tensors, subjects
from quantlab_kernels.packing import packed_width

if TYPE_CHECKING:
    from quantlab_kernels.gpu.weight import GpuWeight

SHAPES = ((4096, 4096), (11008, 4096))
ROWS = (1, 4, 16, 128, 2048)
FORMATS = ("int2", "int3", "int4", "int4-zeros", "int8", "e3m2", "nf4", "power6")
GROUP = 128

Product = Callable[[torch.Tensor], Any]
Timer = Callable[[Sequence[Callable[[], object]]], float]  # milliseconds of one of these calls, made in turn

_CALLS = 128  # in a graph, at least: launching it is then a small share
_REPLAYS = 11
_CACHES = 3  # copies of a weight overflow the cache so many times
_EAGER = 50


def graph_time(calls: Sequence[Callable[[], object]]) -> float:
    """Milliseconds of a call, the median of replays of a graph that makes all of them in turn."""
    many = list(calls) * -(-_CALLS // len(calls))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # what a first call sets up must not be captured
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in many:
            call()
    graph.replay()
    taken = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken) / len(many)


def launch_time(call: Callable[[], object]) -> float:
    """Milliseconds that the host is busy with a call, while the GPU works on earlier ones."""
    call()
    torch.cuda.synchronize()
    start = clock.perf_counter()
    for _ in range(_EAGER):
        call()
    taken = clock.perf_counter() - start
    torch.cuda.synchronize()
    return taken * 1e3 / _EAGER


def traffic(subject: Subject, rows: int, outputs: int, columns: int, group: int) -> int:
    """Bytes that a product must read and write: codes, 16-bit scales, zeros, activations and results."""
    groups = outputs * columns // group
    weight = outputs * packed_width(columns, subject.bits) + groups * (2 + subject.zeros)
    return weight + 2 * rows * (columns + outputs)


def share_of_roofline(milliseconds: float, read: int, bandwidth: float) -> float:
    """The time that ``read`` bytes take at ``bandwidth`` bytes a second, as a share of the time that it took."""
    return read / bandwidth / (milliseconds / 1e3)


def stream_bandwidth(device: torch.device, time: Timer) -> float:
    """Bytes a second: the most that reading 1 GiB, or reading and writing it, comes to."""
    source = torch.empty(1 << 28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    read = source.nbytes / (time([lambda: source.sum()]) / 1e3)
    return max(read, 2 * source.nbytes / (time([lambda: torch.neg(source, out=target)]) / 1e3))


def copies(size: int, device: torch.device) -> int:
    """How many weights of ``size`` bytes it takes so that none is in the cache when its turn comes."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return max(2, -(-_CACHES * cache // size))


def copied(weight: GpuWeight) -> GpuWeight:
    """The same weight elsewhere in memory."""
    zeros = None if weight.zeros is None else weight.zeros.clone()
    return replace(weight, words=weight.words.clone(), scales=weight.scales.clone(), zeros=zeros)


# --- others ---


def peers(subject: Subject, outputs: int, columns: int, device: torch.device) -> dict[str, Callable[[], Product]]:
    """Other implementations of the same product that are installed: each makes a layer with a weight of its own."""

    def dense() -> torch.Tensor:
        return torch.randn(outputs, columns, dtype=torch.float16, device=device) / 64

    def cublas() -> Product:
        weight = dense()
        return lambda x: torch.nn.functional.linear(x, weight)

    found: dict[str, Callable[[], Product]] = {"cublas-f16": cublas}
    if subject.name in ("int2", "int4", "int8") and importlib.util.find_spec("gemlite"):
        found["gemlite"] = lambda: _gemlite(subject.bits, outputs, columns, device)
    if subject.name == "nf4" and importlib.util.find_spec("bitsandbytes"):
        found["bitsandbytes"] = lambda: _bitsandbytes(dense())
    return found


def _gemlite(bits: int, outputs: int, columns: int, device: torch.device) -> Product:
    from gemlite.core import DType, GemLiteLinearTriton

    layer = GemLiteLinearTriton(
        bits, GROUP, in_features=columns, out_features=outputs, input_dtype=DType.FP16, output_dtype=DType.FP16
    )
    codes = torch.randint(0, 1 << bits, (outputs, columns), device=device).to(torch.uint8)
    scales = torch.full((outputs * columns // GROUP, 1), 1 / 64, dtype=torch.float16, device=device)
    layer.pack(codes, scales, torch.full_like(scales, 1 << (bits - 1)), None)
    return layer


def _bitsandbytes(dense: torch.Tensor) -> Product:
    import bitsandbytes

    quantized, state = bitsandbytes.functional.quantize_4bit(dense, blocksize=GROUP, quant_type="nf4")
    return lambda x: bitsandbytes.matmul_4bit(x, quantized.t(), quant_state=state)


# --- records ---


def timings(
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    formats: Sequence[str] = FORMATS,
    time: Timer = graph_time,
    launch: Callable[[Callable[[], object]], float] = launch_time,
) -> Iterator[dict[str, Any]]:
    """A record for each format, shape and number of rows: milliseconds of ours and of each peer, share of the roofline.

    The first record is the bandwidth that a copy reaches. A peer that fails has its error in place of a figure.

    Args:
        device: where.
        shapes: ``(outputs, inputs)``.
        rows: of activations.
        formats: names of subjects.
        time: see :data:`Timer`.
        launch: milliseconds that the host needs for a call.
    """
    from quantlab_kernels.gpu import product

    bandwidth = stream_bandwidth(device, time)
    yield {"stream_bytes_per_second": bandwidth}
    for subject in subjects():
        if subject.name not in formats:
            continue
        for outputs, columns in shapes:
            first = Tensors.random(subject, outputs, columns, GROUP, device).prepared(subject)
            weights = [first, *(copied(first) for _ in range(copies(first.words.nbytes, device) - 1))]
            ours: list[Product] = [lambda x, weight=weight: product(x, weight) for weight in weights]  # type: ignore[misc]
            others = {name: _made(make, outputs * columns, device) for name, make in
                      peers(subject, outputs, columns, device).items()}  # fmt: skip
            for count in rows:
                x = torch.randn(count, columns, dtype=torch.float16, device=device)
                taken = time(_calls(ours, x))
                yield {
                    "format": subject.name,
                    "shape": [outputs, columns],
                    "rows": count,
                    "milliseconds": taken,
                    "roofline": share_of_roofline(taken, traffic(subject, count, outputs, columns, GROUP), bandwidth),
                    "launch": launch(_calls(ours, x)[0]),
                    **{name: _time_or_error(made, x, time) for name, made in others.items()},
                }


def _calls(products: Sequence[Product], x: torch.Tensor) -> list[Callable[[], object]]:
    return [lambda product=product: product(x) for product in products]  # type: ignore[misc]


def _made(make: Callable[[], Product], weights: int, device: torch.device) -> list[Product] | str:
    try:
        return [make() for _ in range(copies(weights // 2, device))]
    except Exception as error:  # another library's: its failure is a result
        return repr(error)


def _time_or_error(made: list[Product] | str, x: torch.Tensor, time: Timer) -> float | str:
    if isinstance(made, str):
        return made
    try:
        return time(_calls(made, x))
    except Exception as error:
        return repr(error)
