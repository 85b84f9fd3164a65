"""One quantized linear layer against torch's own, all in turns: processor time, bandwidth, ratios within a round.

    python benchmarks/linear.py [--rows 1 4 16 128] [--shape 4096x4096] [--format int4 fp6] [--group 64] [--json FILE]

Single thread by default, where the processor time of a thread is what a call costs however busy the machine is; with
more threads the wall clock counts. Before a variant runs again 96 MB of other memory have been read: its weights come
from memory, not from a cache. `fp6` is e3m2 with one scale a row, `w8a8` and `fp8` are the recipes; others are names of
formats as recipes have them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from quantlab_evals import describe_machine, stream_bandwidth
from quantlab_kernels import pack, quantized_linear
from torch.nn.functional import linear

from quantlab.numerics import QTensor, Sample, apply_scales, choose_scales, format_called

SHAPES = ("576x576", "1536x576", "4096x4096", "11008x4096")
FORMATS = ("int2", "int3", "int4", "int5", "int6", "int8", "fp6", "nf4", "power4", "w8a8")
FLUSH = 96 << 20
BASE = "bf16 F.linear"


@dataclass(frozen=True)
class Variant:
    """One way to compute the product; ``bytes`` of its weight are read."""

    name: str
    bytes: int
    call: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """What was measured of one variant. Microseconds; the ratio is the median over rounds of bf16's time by its own."""

    shape: str
    rows: int
    variant: str
    median: float
    minimum: float
    gigabytes_per_second: float
    share_of_stream: float
    times_bf16: float


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", nargs="+", default=SHAPES, help="OUTxIN")
    options.add_argument("--rows", nargs="+", type=int, default=(1, 4, 16, 128))
    options.add_argument("--format", nargs="+", default=FORMATS)
    options.add_argument("--group", nargs="+", default=("64",), help="group sizes, or channel")
    options.add_argument("--rounds", type=int, default=30)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    stream = stream_bandwidth()
    print(f"{describe_machine()}\nmemory is read at {stream / 1e9:.1f} GB/s")
    print(
        f"{'shape':12}{'rows':>5}  {'variant':26}{'us':>9}{'least':>9}{'GB/s':>7}{'stream':>8}{'x bf16':>8}", flush=True
    )
    found: list[Row] = []
    for shape in chosen.shape:
        outputs, inputs = map(int, shape.split("x"))
        weights = Weights(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) / inputs**0.5)
        for rows in chosen.rows:
            variants = list(weights.torchs(rows)) + list(weights.ours(rows, chosen.format, chosen.group))
            for row in measure(variants, shape, rows, chosen.rounds, chosen.threads, stream):
                found.append(row)
                print(
                    f"{row.shape:12}{row.rows:5}  {row.variant:26}{row.median:9.1f}{row.minimum:9.1f}"
                    f"{row.gigabytes_per_second:7.1f}{row.share_of_stream:8.0%}{row.times_bf16:8.2f}",
                    flush=True,
                )
    if chosen.json:
        record = {"machine": asdict(describe_machine()), "stream": stream, "rows": [asdict(row) for row in found]}
        chosen.json.write_text(json.dumps(record, indent=1))


class Weights:
    """One weight, in every form that something here takes; each is made once."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.made: dict[str, tuple[int, tuple]] = {}

    def torchs(self, rows: int):
        """What torch has, where this build has it."""
        outputs, inputs = self.weight.shape
        x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
        half = x.bfloat16()
        kept = self.kept("bf16", lambda: (self.weight.bfloat16(),))
        yield Variant(BASE, 2 * outputs * inputs, lambda: linear(half, *kept))
        full = self.kept("fp32", lambda: (self.weight,))
        yield Variant("fp32 F.linear", 4 * outputs * inputs, lambda: linear(x, *full))
        if inputs % 64 == 0:
            packed, pairs = self.kept("int4pack", self.int4pack)
            call = torch.ops.aten._weight_int4pack_mm_for_cpu
            size = outputs * inputs // 2 + 4 * outputs * inputs // 64
            yield Variant("torch int4pack/64", size, lambda: call(half, packed, 64, pairs))
        if hasattr(torch.ops.onednn, "qlinear_prepack"):
            int8, scales, zeros = self.kept("qlinear", self.qlinear)
            u8 = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8)
            run = torch.ops.onednn.qlinear_pointwise
            rest = (scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], "")
            yield Variant("onednn qlinear w8a8", outputs * inputs, lambda: run(u8, 0.02, 128, int8, *rest))

    def ours(self, rows: int, formats: list[str], groups: list[str]):
        """Our own, by the public interface; activations are rounded within the call where they are."""
        x = torch.randn(rows, self.weight.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
        for name, form, kind in (("w8a8", "int8", "int8"), ("fp8", "e4m3", "fp8")):
            if name not in formats:
                continue
            codes, scales, table, bits, offset = self.kept(name, lambda form=form: self.quantized(form, "channel"))
            weight = (codes, scales, None, table, bits)
            call = lambda w=weight, o=offset, k=kind: quantized_linear(x, *w, offset=o, activations=k)  # noqa: E731
            yield Variant(f"ours {name}", codes.nbytes + scales.nbytes, call)
        formats = [name for name in formats if name not in ("w8a8", "fp8")]
        for name in formats:
            for group in ["channel"] if name == "fp6" else groups:
                if group != "channel" and self.weight.shape[1] % int(group):
                    continue
                key = f"{name}/{group}"
                operands = self.kept(key, lambda name=name, group=group: self.quantized(name, group))
                packed, scales, table, bits, offset = operands
                size = sum(t.nbytes for t in (packed, scales, table))
                weight = (packed, scales, None, table, bits)
                yield Variant(f"ours {key}", size, lambda w=weight, o=offset: quantized_linear(x, *w, offset=o))

    def kept(self, key: str, make: Callable[[], tuple]) -> tuple:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def int4pack(self) -> tuple:
        codes, scales = self.rounded(64, 8)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes + 8, 1)
        pairs = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous().bfloat16()
        return packed, pairs

    def qlinear(self) -> tuple:
        codes, scales = self.rounded(self.weight.shape[1], 128)
        packed = torch.ops.onednn.qlinear_prepack(codes.to(torch.int8).contiguous(), None)
        return packed, scales.flatten().float(), torch.zeros(len(codes), dtype=torch.long)

    def rounded(self, group: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
        groups = self.weight.unflatten(1, (-1, group))
        scales = groups.abs().amax(-1) / (half - 1)
        codes = (groups / scales.unsqueeze(-1)).round().clamp(-half, half - 1)
        return codes.flatten(1).int(), scales

    def quantized(self, name: str, group: str) -> tuple:
        form = format_called("e3m2" if name == "fp6" else name)
        shared = group if group == "channel" else int(group)
        grid = form.grid_for(Sample(self.weight[:64], shared))
        scales = choose_scales(self.weight, grid, shared, search=False, stored="bfloat16")
        made = QTensor.of(apply_scales(self.weight, grid, scales), scales, grid)
        offset = -(len(grid) // 2) if grid.is_integer else 0
        return pack(made.codes, grid.bits), made.scales, grid.values, grid.bits, offset


@torch.inference_mode()
def measure(variants: list[Variant], shape: str, rows: int, rounds: int, threads: int, stream: float) -> list[Row]:
    """Run all variants in turns; the first of them is what the others are compared with."""
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    flush = torch.ones(FLUSH // 4)
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    between = sum(variant.bytes for variant in variants)
    for index in range(rounds + 1):
        for variant in variants:
            if between - variant.bytes < FLUSH:  # the other variants' weights do not fill the caches
                flush.sum()
                if variant.bytes < FLUSH // 16:  # too little work to bring its own code back
                    torch.mm(flush[:64].view(8, 8), flush[:64].view(8, 8))
            started = clock()
            variant.call()
            if index:
                seconds[variant.name].append((clock() - started) / 1e9)
    base = seconds[variants[0].name]
    found = []
    for variant in variants:
        took = seconds[variant.name]
        median, ratio = statistics.median(took), statistics.median(b / own for b, own in zip(base, took, strict=True))
        rate = variant.bytes / median
        times = (1e6 * median, 1e6 * min(took), rate / 1e9, rate / stream, ratio)
        found.append(Row(shape, rows, variant.name, *times))
    return found


if __name__ == "__main__":
    main()
