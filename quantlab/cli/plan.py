"""The command `quantlab plan`, and what `quantlab inspect` says of a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from quantlab.cli.options import (
    MODEL,
    CalibrationLength,
    CalibrationSamples,
    CalibrationSeed,
    CalibrationSource,
    Json,
    Quiet,
    RecipeSettings,
    Threads,
    overrides_with_calibration,
    prepare,
)
from quantlab.cli.output import Output

EXAMPLES = (
    "Examples:\n\n"
    "  quantlab plan demo --budget 3.5bits --out plan.yaml\n"
    "  quantlab quantize demo --recipe plan.yaml --out demo-planned\n"
    "  quantlab plan demo --budget 90MB --candidates formats=int3,int4,int8,nf4 --out plan.yaml\n"
    "  quantlab plan demo --pareto --out curve.json\n"
    "  quantlab inspect plan.yaml --layer model.layers.3.mlp.down_proj\n\n"
    "What the sensitivity found is kept, and the next budget takes seconds."
)


def plan(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="The plan, a recipe (.yaml); of --pareto the curve (.json)."),
    ],
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            help="3.5bits (a weight, all counted), 3.5code-bits, 90MB (the model), 20ms (a token), loss=0.05, ppl=2%, "
            "like=RECIPE.",
        ),
    ] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Instead of one budget, the whole curve.")] = False,
    points: Annotated[int, typer.Option(min=2, metavar="N", help="Of the curve.")] = 17,
    measure: Annotated[
        int | None,
        typer.Option(
            "--measure",
            min=0,
            metavar="N",
            help="Quantize N plans of the curve, or the plan (1), and measure them.",
        ),
    ] = None,
    text: Annotated[str, typer.Option(help="What --measure measures on.")] = "builtin:eval",
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="Of that text.")] = 8,
    candidates: Annotated[
        str | None, typer.Option(help='What layers choose from, "AXIS=VALUE,...", as `quantlab compare` takes it.')
    ] = None,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="What holds for all candidates.")] = "w4-gptq",
    settings: RecipeSettings = None,
    sensitivity: Annotated[str, typer.Option(help="How layers are judged; docs/plan.md says which, when.")] = "error",
    options: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Of the sensitivity.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Layers outside the blocks: a head, embeddings.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="A layer may also stay as it is.")] = False,
    separate: Annotated[
        bool, typer.Option("--separate", help="Do not give q/k/v, gate/up and the experts of a block the same scheme.")
    ] = False,
    solver: Annotated[str, typer.Option(help="auto, knapsack, milp, search, or bisection: really evaluates.")] = "auto",
    device: Annotated[
        str | None,
        typer.Option(
            help="Where the model is measured: cpu, cuda, cuda:1, or auto: a GPU if any. A name that --latency takes "
            "is taken for that. [default: cpu]"
        ),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="What milliseconds are of: here (measured on --device), or a name that `quantlab roofline` knows.",
        ),
    ] = None,
    calibration: CalibrationSource = None,
    samples: CalibrationSamples = None,
    length: CalibrationLength = None,
    seed: CalibrationSeed = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where sensitivities are kept. [default: the user's cache]")
    ] = None,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Choose a scheme for every layer under a budget, and write it as a recipe."""
    overrides = overrides_with_calibration(settings, calibration, samples, length, seed)
    with Output(as_json, quiet, on_interrupt=lambda: "interrupted; no plan was written") as output:
        from quantlab.cli import show_plan
        from quantlab.cli.progress import stderr_console
        from quantlab.cli.stages import stage_progress
        from quantlab.errors import QuantlabError

        if (budget is None) != pareto:
            raise QuantlabError("give a --budget, or --pareto for all of them")
        wanted = (".json",) if pareto else (".yaml", ".yml")
        if out.suffix not in wanted:
            what = "a curve is JSON" if pareto else "a plan is a recipe"
            raise QuantlabError(f"--out {out}: {what}; give it a name that ends in {wanted[0]}")
        if not out.absolute().parent.is_dir():
            raise QuantlabError(f"--out {out}: there is no folder {out.parent}; make it first")
        prepare(threads, quiet=quiet)
        from quantlab.allocation.budget import parse_budget
        from quantlab.plan_check import Check, curve
        from quantlab.planning import CANDIDATES, prepare_planning

        limit = None if budget is None else parse_budget(budget)
        with stage_progress(stderr_console(), quiet=quiet) as tell:
            planning = prepare_planning(
                model,
                candidates=candidates or CANDIDATES,
                recipe=recipe,
                overrides=overrides,
                sensitivity=sensitivity,
                options=_options(options),
                include=include or (),
                keep=keep,
                together=not separate,
                device=device,
                latency=latency,
                cache=cache,
                tell=tell,
            )
            check = Check(model, text, windows, device=str(planning.task.source.device))
            if limit is None:
                count = 3 if measure is None else measure
                found = curve(planning, points=points, check=check, checked=count, solver=solver, tell=tell)
                out.write_text(json.dumps(found.to_dict(), indent=1), encoding="utf-8")
                output.answer({"curve": out, **found.to_dict()}, *show_plan.curve(found, model, out))
                return
            planning.check(limit)
            chosen = planning.solve(limit, solver)
            if measure:
                tell(0, 1, "quantizing and measuring the plan")
                chosen = check.measure(chosen)
        chosen.write(out)
        output.answer({"plan": out, **chosen.to_dict()}, *show_plan.planned(chosen, out))


def explain(output: Output, file: Path, layer: str | None) -> None:
    """Show a plan, or why one of its layers got what it got."""
    from quantlab.cli import show_plan

    prepare(None, quiet=True)
    from quantlab.allocation.explanation import explain as explain_layer
    from quantlab.allocation.plan import read_plan

    found = read_plan(file)
    if layer is None:
        figures = found.figures()
        output.answer(figures, *show_plan.planned(found, None))
        return
    item, said = explain_layer(found, layer)
    record = next(entry for entry in found.figures()["items"] if layer in entry["layers"])
    output.answer({"layer": layer, **record, "why": said}, *show_plan.explained(found, layer, item, said))


def _options(settings: list[str] | None) -> dict[str, Any]:
    import yaml

    from quantlab.errors import QuantlabError

    found = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise QuantlabError(f"--option {setting!r}: expected KEY=VALUE, for example coefficients=none")
        found[key.strip()] = yaml.safe_load(value)
    return found
