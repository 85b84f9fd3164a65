"""The command `quantlab bench`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from quantlab.cli.options import MODEL, Device, Json, Quiet, Threads, prepare
from quantlab.cli.output import Output

EXAMPLES = (
    "Examples:\n\n"
    "  quantlab bench demo-w4 --against demo\n"
    "  quantlab bench demo-w4 demo-w8 --against demo --batch 1 --batch 8 --prompt 512 --new 32 --rounds 9 --json\n"
    "  quantlab bench demo-w4 --kernels"
)


def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MODEL + " Quantized or not; one or more.")],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What to compare with, usually the original.")
    ] = None,
    prompt: Annotated[int, typer.Option(metavar="N", help="Tokens of a prompt.")] = 128,
    new: Annotated[int, typer.Option(metavar="N", help="Tokens to decode after it.")] = 64,
    batch: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Prompts at once. Can be given several times. [default: 1]")
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", help="Turns that each model gets.")] = 5,
    compile_: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also decode with a compiled step: minutes to build, once.")
    ] = True,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Also load each model in a process of its own.")
    ] = True,
    layers: Annotated[bool, typer.Option("--layers/--no-layers", help="Also time each kind of layer alone.")] = True,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Measure nothing: list which kernel each kind of layer would run.")
    ] = False,
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure speed and memory: prompts, decoding, layers, loading; several models in turns."""
    with Output(as_json, quiet, on_interrupt=lambda: "interrupted; nothing was measured to the end") as output:
        from quantlab.cli import show_bench
        from quantlab.cli.progress import stderr_console
        from quantlab.cli.stages import stage_progress

        prepare(threads, quiet=quiet)
        from quantlab_evals import SpeedSettings

        from quantlab.benchmark import bench as measure
        from quantlab.layer_speed import kernels as kernels_of

        if kernels:
            chosen = {name: kernels_of(name, batch or (1, 4, 16, 128), device) for name in models}
            document = {name: [asdict(kernel) for kernel in found] for name, found in chosen.items()}
            output.answer({"kernels": document}, *show_bench.kernels(chosen))
            return
        settings = SpeedSettings(prompt, new, tuple(batch or (1,)), rounds, compile_)
        with stage_progress(stderr_console(), quiet=quiet) as progress:
            found = measure(
                models,
                against=against,
                settings=settings,
                memory=memory,
                layers=layers,
                device=device,
                progress=progress,
            )
        output.answer(found.to_dict(), *show_bench.benched(found))
