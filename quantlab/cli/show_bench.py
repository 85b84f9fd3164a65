"""Measured speed as a person reads it: a table of models, one of layers, and how it came about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from quantlab.cli.show import clock, pairs, repeated, size

if TYPE_CHECKING:
    from quantlab.benchmark import Bench, BenchedModel
    from quantlab.layer_speed import ChosenKernel, LayerSpeed


def benched(bench: Bench) -> Iterator[RenderableType]:
    """Models by batch size, their layers, and how it came about."""
    settings = bench.comparison.settings
    for batch in settings.batches:
        prompts = "one prompt" if batch == 1 else f"{batch} prompts at once"
        yield Text(f"{prompts} of {settings.prompt_tokens} tokens, {settings.new_tokens} new tokens each", style="bold")
        yield _models(bench, batch)
        yield Text("")
    if any(model.loading for model in bench.models):
        yield Text("loading, in a process of its own", style="bold")
        yield _loading(bench.models)
        yield Text("")
    layers = [(model.name, layer) for model in bench.models for layer in model.layers]
    if layers:
        yield Text("one layer, its weights coming from memory", style="bold")
        yield _layers(layers)
        yield Text("")
    yield _how(bench)


def kernels(models: Mapping[str, Sequence[ChosenKernel]]) -> Iterator[RenderableType]:
    """A line for each kind of layer and number of rows."""
    table = _table(["model", "layer", "format"], ["shape", "count", "rows"])
    table.add_column("kernel", overflow="fold")
    for name, chosen in models.items():
        for kernel in chosen:
            shape = "x".join(map(str, kernel.shape))
            table.add_row(name, kernel.layer, kernel.format, shape, str(kernel.count), str(kernel.rows), kernel.kernel)
    yield table


def _table(left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in left:
        table.add_column(header, overflow="fold")
    for header in right:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _models(bench: Bench, batch: int) -> Table:
    compared = bench.against is not None
    ratio = ["times"] if compared else []
    table = _table(
        ["model"],
        ["prompt tok/s", *ratio, "first token", "tok/s", "quartiles", *ratio, "CPU ms/token", "eager", "compiled"],
    )
    for model in bench.models:
        best = model.speed.best(batch)
        low, high = (best.batch / seconds for seconds in reversed(best.step.quartiles))
        ways = {run.compiled: run for run in model.speed.runs if run.batch == batch}
        prefill, step = (
            [f"{bench.ratio(model.name, batch, what):.2f}"] if compared else [] for what in ("prefill", "step")
        )
        table.add_row(
            model.name,
            f"{best.prefill_rate:.0f}",
            *prefill,
            duration(best.prefill.median),
            f"{best.decode_rate:.1f}",
            f"{low:.1f} to {high:.1f}",
            *step,
            f"{1e3 * best.step.cpu_median / batch:.2f}",
            *(f"{ways[way].decode_rate:.1f}" if way in ways else "" for way in (False, True)),
        )
    return table


def _loading(models: Sequence[BenchedModel]) -> Table:
    there = any(model.loading is not None and model.loading.on_device is not None for model in models)
    on_device = ["on GPUs"] if there else []
    table = _table(["model"], ["files", "seconds", "peak loading", "peak running", "of it own", "mapped", *on_device])
    for model in models:
        cost = model.loading
        if cost is not None:
            memory = (cost.loaded.peak, cost.running.peak, cost.running.peak_own, cost.running.mapped)
            gpus = [size(cost.on_device)] if cost.on_device is not None else []
            sizes = (size(max(0, m)) for m in memory)
            table.add_row(model.name, size(model.bytes), f"{cost.seconds:.1f}", *sizes, *gpus)
    return table


def _layers(layers: Sequence[tuple[str, LayerSpeed]]) -> Table:
    table = _table(["model", "layer", "format"], ["shape", "count", "rows", "us", "least", "GB/s", "of stream"])
    for name, layer in layers:
        table.add_row(
            name,
            layer.layer,
            layer.format,
            "x".join(map(str, layer.shape)),
            str(layer.count),
            str(layer.rows),
            f"{1e6 * layer.timing.median:.0f}",
            f"{1e6 * min(layer.timing.wall):.0f}",
            f"{layer.bandwidth / 1e9:.1f}",
            f"{layer.share:.0%}",
        )
    return table


def _how(bench: Bench) -> Table:
    settings, machine = bench.comparison.settings, bench.comparison.machine
    table = pairs()
    table.add_row("machine", f"{machine.cpu}, {machine.instructions}, {machine.threads} of {machine.cores} threads")
    devices = dict.fromkeys(model.speed.device for model in bench.models)
    if list(devices) != ["cpu"]:
        table.add_row("device", ", ".join(devices))
    table.add_row("memory", f"read at {bench.stream_bandwidth / 1e9:.1f} GB/s in this run")
    table.add_row("software", f"torch {machine.torch}, transformers {machine.transformers}, Python {machine.python}")
    table.add_row("decoding", "greedy, on a static cache; of eager and compiled steps the faster counts")
    table.add_row("rounds", f"{settings.rounds}, models in turns; medians and quartiles over rounds")
    if bench.against is not None:
        table.add_row("times", f"faster than {bench.against}: the median over rounds of the ratio in a round")
    for label, line in zip(repeated("compiled"), _compiling(bench), strict=False):
        table.add_row(label, line)
    table.add_row("time", clock(bench.seconds))
    return table


def _compiling(bench: Bench) -> Iterator[str]:
    for model in bench.models:
        built: list[Any] = [run for run in model.speed.runs if run.compiled]
        if built:
            yield f"{model.name} in {clock(sum(run.build_seconds for run in built))}"
        if model.speed.not_compiled:
            yield f"{model.name}: not, because {model.speed.not_compiled}"


def duration(seconds: float) -> str:
    """A duration with three digits: ``85.2 us``, ``8.32 ms``, ``125 ms``, ``2.10 s``."""
    unit, scale = next(((unit, s) for unit, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= 0.9995 * s), ("us", 1e-6))
    value = seconds / scale
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
