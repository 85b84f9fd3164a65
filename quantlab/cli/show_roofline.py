"""Predicted speed as a person reads it: a table, and where the figures come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from quantlab.cli.show import pairs, size
from quantlab.cli.show_bench import duration

if TYPE_CHECKING:
    from quantlab.prediction import Prediction, Roofline


def predicted(found: Roofline) -> Iterator[RenderableType]:
    """A line for each device and shape, and the sources."""
    yield Text(f"{found.model}: predicted, not measured; a context of {found.tokens} tokens", style="bold")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("device", "model"):
        table.add_column(header, overflow="fold")
    for header in ("weights", "KV", "prompt", "a token", "tok/s", "contexts", "all tok/s", "switch"):
        table.add_column(header, justify="right", no_wrap=True)
    for prediction in found.predictions:
        table.add_row(*_cells(prediction))
    yield table
    yield Text("")
    yield _sources(found)


def _cells(found: Prediction) -> tuple[str, ...]:
    times = [found.prefill_seconds, found.step_seconds, found.switch_seconds]
    prompt, token, switch = ("" if seconds is None else duration(seconds) for seconds in times)
    head = (found.device, found.model, size(round(found.weight_bytes)), size(round(found.kv_bytes)))
    if not found.fits:
        return (*head, "does not fit", *[""] * 5)
    rates = (f"{found.tokens_per_second:.0f}", str(found.concurrency), f"{found.batch_tokens_per_second:.0f}", switch)
    return (*head, prompt, token, *rates)


def _sources(found: Roofline) -> Table:
    table = pairs()
    table.add_row(
        "prompt", "to read it: operations over the device's peak, or weights over its bandwidth if that is longer"
    )
    table.add_row("a token", "weights and KV cache over the bandwidth, one context alone; tok/s is its inverse")
    table.add_row("contexts", "that fit beside the weights; all tok/s: all of them decoding at once")
    table.add_row("switch", "one context out to the host and another in")
    for device in found.devices:
        peak = (
            f"{device.flops / 1e12:.3g} TFLOPS, {device.bandwidth / 1e9:.0f} GB/s, {device.memory / (1 << 30):.0f} GiB"
        )
        table.add_row(device.name, f"{peak}: {device.source}")
    table.add_row("bounds", "no program reaches them: expect 50 to 90 % of a rate, less in small models")
    return table
