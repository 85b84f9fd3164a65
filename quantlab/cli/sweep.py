"""The commands `quantlab sweep`, `quantlab pareto` and `quantlab report`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantlab.cli.options import MODEL, Device, Json, Quiet, Threads, prepare
from quantlab.cli.output import Output

if TYPE_CHECKING:
    from quantlab_evals import Limit

    from quantlab.sweep import Sweep

SWEEP_EXAMPLES = (
    "Examples:\n\n"
    "  quantlab sweep demo --space front --out demo-front --windows 8 --length 256\n"
    "  quantlab sweep demo --space my-space.yaml --out demo-sweep --set calibration.samples=8 --speed --keep\n\n"
    "Interrupted, the same command goes on where it stopped."
)
PARETO_EXAMPLES = (
    "Examples:\n\n"
    "  quantlab pareto demo-front\n"
    "  quantlab pareto demo-front --measures bits,kl,decode --under bits=3.5\n"
    "  quantlab pareto demo-front --within ppl=1% --csv front.csv"
)
REPORT_EXAMPLES = "Example:\n\n  quantlab report demo-front --out report.html --plots plots"

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `quantlab sweep` wrote.")]


def sweep(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the records and the report.")],
    space: Annotated[
        str, typer.Option("--space", "-s", help="What to try: a ready space, or a YAML file; see the guide.")
    ] = "front",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a field of every recipe. Can be given several times."),
    ] = None,
    text: Annotated[
        str, typer.Option(help="To evaluate on: a file, `builtin:eval`, or a data set name:config:split:column.")
    ] = "builtin:eval",
    windows: Annotated[int | None, typer.Option(metavar="N", help="How many windows. \\[default: all]")] = None,
    length: Annotated[int | None, typer.Option(metavar="N", help="Tokens in a window. \\[default: 2048]")] = None,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Also measure speed and memory, each in turns with the original.")
    ] = False,
    prompt: Annotated[int, typer.Option(metavar="N", help="With --speed: tokens of a prompt.")] = 128,
    new: Annotated[int, typer.Option(metavar="N", help="With --speed: tokens to decode after it.")] = 32,
    devices: Annotated[
        str, typer.Option(metavar="LIST", help="Predict decoding on these devices, as `quantlab roofline`; or none.")
    ] = "rtx4090",
    keep: Annotated[bool, typer.Option("--keep", help="Keep the quantized models, in DIR/variants.")] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Go on with a space that has changed; records of what is in both count.")
    ] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Several variants at once, each with --threads, on a Ray of this machine.")
    ] = False,
    ray_address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="The same, on a Ray cluster: host:port, or auto.")
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quantize a model in many ways, measure each, and write a report: how good against how small and how fast."""
    resume = "interrupted; run the same command again to go on"
    with Output(as_json, quiet, on_interrupt=lambda: resume) as output:
        from quantlab.cli import show_sweep
        from quantlab.cli.progress import stderr_console
        from quantlab.errors import QuantlabError

        distributed = ray or ray_address is not None
        if distributed and speed:
            raise QuantlabError(
                "--speed: what is measured while other variants run on the machine says nothing; leave out --ray, or "
                "sweep with --ray --keep and measure the best with `quantlab bench`"
            )
        if distributed and ":" in device:
            raise QuantlabError(f"--device {device}: on Ray every variant gets a GPU of its own; use --device cuda")
        prepare(threads, quiet=quiet)
        from quantlab_evals import SpeedSettings

        from quantlab.sweep import Setup, cluster
        from quantlab.sweep import sweep as run

        setup = Setup(
            model,
            out,
            text=text,
            settings={"windows": windows, "length": length, "measures": ("perplexity", "divergence", "calibration")},
            speed=SpeedSettings(prompt, new, rounds=3, compiled=False) if speed else None,
            devices=tuple(name.strip() for name in devices.split(",") if name.strip() not in ("", "none")),
            keep=keep,
            threads=threads,
            device=device,
        )
        with show_sweep.watched(stderr_console(), model, quiet=quiet) as watcher:
            found = run(
                model,
                space,
                out,
                overrides=settings or (),
                setup=setup,
                extend=extend,
                watcher=watcher,
                runner=cluster.runner(ray_address) if distributed else None,
            )
        page = _write_report(found, out / "report.html")
        output.answer({**found.to_dict(), "report": page}, *show_sweep.swept(found, page))


def pareto(
    folder: Folder,
    measures: Annotated[
        str, typer.Option("--measures", "-m", metavar="LIST", help="Two or three, such as bits,kl,decode.")
    ] = "bits,kl",
    under: Annotated[
        list[str] | None,
        typer.Option(metavar="MEASURE=VALUE", help="The best with at most that much. Can be given several times."),
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(metavar="MEASURE=VALUE", help="The best with at least that much. Can be given several times."),
    ] = None,
    within: Annotated[
        str | None,
        typer.Option(metavar="MEASURE=SHARE", help="The smallest that is no more than that off the original: ppl=1%."),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(metavar="MEASURE", help="What best means: the first measure of quality that was asked for."),
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(metavar="MEASURE=VALUE", help="Corner of the hypervolume. \\[default: the worst of all variants]"),
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write every variant to a CSV file.")] = None,
    as_json: Json = False,
) -> None:
    """Show which variants no other beats, where the front bends, and which to take under a limit."""
    with Output(as_json) as output:
        from quantlab.cli import show_sweep

        prepare(None, quiet=True)
        from quantlab_evals import Limit, best, measure_called
        from quantlab_evals import pareto as front_of
        from quantlab_evals import within as near

        from quantlab.errors import DataError, QuantlabError
        from quantlab.sweep import read_sweep

        found = read_sweep(folder)
        names = [name.strip() for name in measures.split(",")]
        front = front_of(found.measured, names, dict(_pair(text, "--reference") for text in reference or ()))
        limits = [Limit(measure_called(n), high=v) for n, v in (_pair(text, "--under") for text in under or ())]
        limits += [Limit(measure_called(n), low=v) for n, v in (_pair(text, "--over") for text in over or ())]
        quality = by or next((name for name in names if name not in _SIZES), names[-1])
        answers: list[tuple[str, Mapping[str, Any] | None]] = []
        variants = [record for record in found.measured if record["kind"] != "original"]
        if limits:
            answers.append((_words(f"best {measure_called(quality).label}", limits), best(variants, quality, limits)))
        if within is not None:
            if found.original is None:
                raise DataError(f"{folder}: the original was not measured; run the sweep again")
            name, share = _pair(within, "--within")
            limit = near(found.original, name, share)
            answers.append((_words("smallest", [limit]), best(variants, "bytes", [limit])))
        if csv is not None:
            try:
                csv.write_text(show_sweep.as_csv(found, front), encoding="utf-8")
            except OSError as error:
                raise QuantlabError(f"--csv {csv}: cannot be written ({error.strerror})") from error
        output.answer(show_sweep.front_document(front, answers), *show_sweep.fronted(found, front, answers))


def report(
    folder: Folder,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page. \\[default: DIR/report.html]")] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also draw the main plots as SVG, for a README.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a sweep as one web page that needs no network."""
    with Output(as_json, quiet) as output:
        prepare(None, quiet=True)
        from quantlab.errors import DataError
        from quantlab.sweep import read_sweep

        found = read_sweep(folder)
        if not found.measured:
            raise DataError(f"{folder}: nothing was measured yet; let the sweep finish a variant")
        page = _write_report(found, out or folder / "report.html")
        drawn: list[Path] = []
        if plots is not None:
            from quantlab_evals.report import pictures

            plots.mkdir(parents=True, exist_ok=True)
            for name, picture in pictures(found.records, found.about).items():
                drawn.append(plots / f"{name}.svg")
                drawn[-1].write_text(picture, encoding="utf-8")
        output.answer({"report": page, "plots": drawn}, *(f"written: {file}" for file in (page, *drawn)))


_SIZES = ("bits", "model_bits", "bytes", "decode", "prefill", "first_token", "times_faster", "memory", "load_seconds")


def _write_report(found: Sweep, file: Path) -> Path | None:
    """The page of a sweep; None where there is nothing to show yet."""
    from quantlab_evals.report import page

    from quantlab.errors import QuantlabError

    if not found.measured:
        return None
    try:
        file.write_text(page(found.records, found.about), encoding="utf-8")
    except OSError as error:
        raise QuantlabError(f"{file}: cannot be written ({error.strerror}); choose another place") from error
    return file


def _pair(text: str, option: str) -> tuple[str, float]:
    """``bits=3.5``; a value may be a percentage."""
    from quantlab.errors import QuantlabError

    name, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError
        return name.strip(), float(value[:-1]) / 100 if value.endswith("%") else float(value)
    except ValueError as error:
        raise QuantlabError(f"{option} {text!r}: expected MEASURE=NUMBER, such as bits=3.5 or ppl=1%") from error


def _words(what: str, limits: list[Limit]) -> str:
    return f"{what}, {', '.join(map(str, limits))}"
