"""What several commands have in common: options, and what comes before the work."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from quantlab.cli.output import quiet_libraries

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else, to standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only (and the document, with --json).")]
Threads = Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads. [default: what torch takes]")]
Device = Annotated[
    str,
    typer.Option(help="Where models run: cpu, cuda, cuda:1, or auto: on GPUs if any, the rest in memory and on disk."),
]
MODEL = "A local model folder, a Hugging Face id, a .gguf file, or `demo`."
MEASURED = "A model folder, quantized or not, a Hugging Face id, a .gguf file, `demo`, or TOOL:KIND:MODEL."


def prepare(threads: int | None, *, quiet: bool) -> None:
    """Set up the libraries, which takes seconds the first time."""
    quiet_libraries(progress_bars=not quiet and sys.stderr.isatty())
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if os.environ.get("QUANTLAB_KERNEL"):
        from quantlab_kernels import forced

        from quantlab.errors import QuantlabError

        try:
            forced()
        except ValueError as error:
            raise QuantlabError(f"QUANTLAB_KERNEL: {error}") from error


def overrides_with_calibration(
    settings: list[str] | None,
    source: str | None,
    samples: int | None,
    length: int | None,
    seed: int | None = None,
) -> list[str]:
    """The calibration options that were given as ``--set`` would say them, and then what ``--set`` says."""
    short = {"source": source, "samples": samples, "length": length, "seed": seed}
    return [f"calibration.{key}={value}" for key, value in short.items() if value is not None] + (settings or [])


def chosen_settings(settings: list[str] | None, known: tuple[str, ...]) -> dict[str, Any]:
    """``key=value`` settings as a mapping; values are YAML. Raises `QuantlabError` for an unknown key."""
    import yaml

    from quantlab.errors import QuantlabError

    chosen: dict[str, Any] = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            raise QuantlabError(f"--set {setting!r}: expected KEY=VALUE with a key out of {', '.join(known)}")
        try:
            chosen[key] = value if key == "text" else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise QuantlabError(f"--set {setting!r}: the value is not valid YAML") from error
    return chosen


def numbers(values: str, option: str) -> list[float]:
    """A list like ``0,0.7,1``. Raises `QuantlabError` if it is none."""
    from quantlab.errors import QuantlabError

    try:
        return [float(value) for value in values.split(",")]
    except ValueError as error:
        raise QuantlabError(f"{option} {values!r}: use numbers with commas between them, like 0,0.7,1") from error
