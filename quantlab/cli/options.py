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
RecipeSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the recipe. Can be given several times."),
]
CalibrationSource = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Calibration text: `builtin`, a text or .jsonl file, a data set name:config:split:column.",
    ),
]
CalibrationSamples = Annotated[int | None, typer.Option(metavar="N", help="Calibration sequences.")]
CalibrationLength = Annotated[int | None, typer.Option(metavar="N", help="Tokens in a calibration sequence.")]
CalibrationSeed = Annotated[int | None, typer.Option(metavar="N", help="For drawing the calibration sequences.")]
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


def chosen_settings(settings: list[str] | None, known: tuple[str, ...] | None = None) -> dict[str, Any]:
    """``key=value`` settings as a mapping; values are YAML.

    Args:
        settings: as they were given.
        known: the keys that there are; None: others will check them.

    Raises:
        QuantlabError: an unknown key, or a value that cannot be read.
    """
    import yaml

    from quantlab.errors import QuantlabError

    chosen: dict[str, Any] = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals or (known is not None and key not in known):
            keys = "" if known is None else f" with a key out of {', '.join(known)}"
            raise QuantlabError(f"--set {setting!r}: expected KEY=VALUE{keys}")
        try:
            chosen[key] = value if key == "text" else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise QuantlabError(f"--set {setting!r}: the value is not valid YAML") from error
    return chosen


def numbers(values: str, option: str) -> list[float]:
    """A list like ``0,0.7,1``.

    Raises:
        QuantlabError: it is none.
    """
    from quantlab.errors import QuantlabError

    try:
        return [float(value) for value in values.split(",")]
    except ValueError as error:
        raise QuantlabError(f"{option} {values!r}: use numbers with commas between them, like 0,0.7,1") from error
