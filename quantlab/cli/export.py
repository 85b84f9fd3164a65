"""`quantlab export` and `export-adapter`: a quantized model, or its corrections, in another tool's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantlab.cli.options import Json, Quiet, Threads, chosen_settings, prepare
from quantlab.cli.output import Output

EXAMPLES = (
    "Examples:\n\n"
    "  quantlab export demo-w4 --to compressed-tensors --out demo-ct\n"
    "  quantlab export demo-w4 --to gguf --out demo-w4.gguf\n"
    "  quantlab export demo-w4 --to gptq --out demo-gptq --set version=2\n\n"
    "Codes are kept where the format has them; where it does not, the layer is named with the reason."
)
ADAPTER_EXAMPLES = "Example:\n\n  quantlab export-adapter demo-w4-lorc demo-adapter"


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `quantlab quantize` wrote.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="compressed-tensors, gptq, gguf or peft.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder (gguf: the file) to write; it must not exist.")],
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round layers that the format cannot hold again, a second loss.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="What the format lets one choose; see docs/export.md."),
    ] = None,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a quantized model in another tool's format, with its own codes where they fit."""
    with Output(as_json, quiet) as output:
        chosen = chosen_settings(settings)
        prepare(threads, quiet=True)
        from quantlab.export import export as run

        done = run(folder, to, out, requantize=requantize, settings=chosen)
        output.answer(done.to_dict(), *_shown(done))


def export_adapter(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `quantlab quantize` wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist yet.")],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What the adapter is for: a name or folder for its config.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the low-rank corrections of a quantized model as a PEFT adapter, for the same codes elsewhere."""
    with Output(as_json) as output:
        prepare(None, quiet=True)
        from quantlab.checkpoint.adapter import save_adapter

        save_adapter(folder, out, base)
        output.answer({"folder": folder, "adapter": out}, f"adapter written to {out}")


def _shown(done: Any) -> list[str]:
    """What was written, the kinds that layers became, and what was lost."""
    kinds: dict[str, int] = {}
    for layer in done.layers:
        kinds[layer.stored] = kinds.get(layer.stored, 0) + 1
    lines = [f"{done.path}: {done.format}, {done.bytes / 1e6:.1f} MB"]
    lines += [f"  {count} layers: {kind}" for kind, count in kinds.items()]
    changed = [layer for layer in done.layers if not layer.exact]
    if not changed:
        lines.append("  every layer decodes to the same weight as before")
    for reason in dict.fromkeys(layer.note for layer in changed):
        lines.append(f"  {sum(layer.note == reason for layer in changed)} layers {reason}")
    return [*lines, *(f"  {note}" for note in done.notes)]
