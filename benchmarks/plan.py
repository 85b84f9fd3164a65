"""Plans against the simple ways to mix bits, at the same bytes: perplexity of each, on several calibration draws.

    python benchmarks/plan.py MODEL --calibrate wikitext2.valid.txt --measure wikitext2.test.txt --record plans.jsonl

At each budget (average width of the codes, in groups of 64; the plan gets the bytes of the uniform recipe, at 3.5 the
mean of 3 and 4): uniform, first and last blocks higher, down_proj higher, and the plan. One line of JSON a run is
appended to the record; what is there already is not run again, so that a killed run goes on. The end is a table and the
verdicts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import quantlab
import quantlab.allocation.budget
import quantlab.checkpoint.source
from quantlab.engine.architecture import describe
from quantlab.planning import prepare_planning

BASES = {4.0: "int3", 3.5: "int3", 3.0: "int2"}
# How the simple recipes spend what a budget leaves above their base: (name, pattern of layers or blocks, format).
FIRST_LAST = {4.0: [("int6", 10)], 3.5: [("int4", 15), ("int6", 5)], 3.0: [("int6", 7)]}
DOWN = {4.0: "int6", 3.5: "int5", 3.0: "int6"}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("--calibrate", required=True)
    options.add_argument("--measure", required=True)
    options.add_argument("--record", required=True, type=Path)
    options.add_argument("--recipe", default="w4-gptq-fast")
    options.add_argument("--seed", type=int, action="append")
    options.add_argument("--budget", type=float, action="append", choices=sorted(BASES))
    options.add_argument("--sensitivity", action="append", help="Default: error.")
    options.add_argument("--set", action="append", default=[], help="Of the recipe.")
    options.add_argument("--samples", type=int, default=64)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--windows", type=int, default=16)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--only", choices=["plan", "simple"])
    options.add_argument("--table", action="store_true", help="Run nothing; print what the record says.")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    budgets = chosen.budget or sorted(BASES, reverse=True)
    if not chosen.table:
        for seed in chosen.seed or [0, 1]:
            run_seed(chosen, seed, budgets)
    report(read(chosen.record), budgets)


def run_seed(chosen: argparse.Namespace, seed: int, budgets: list[float]) -> None:
    settings = {"source": chosen.calibrate, "samples": chosen.samples, "length": chosen.length, "seed": seed}
    overrides = [*chosen.set, *(f"calibration.{key}={value}" for key, value in settings.items())]
    runs: list[tuple[str, float, Any]] = []
    if chosen.only != "simple":
        for method in chosen.sensitivity or ["error"]:
            runs += [(f"plan-{method}", budget, method) for budget in budgets]
    if chosen.only != "plan":
        blocks = [4.0, 3.0] if 3.5 in budgets else [budget for budget in budgets if budget != 3.5]
        runs += [("uniform", budget, {"format": f"int{budget:.0f}"}) for budget in blocks]
        for budget in budgets:
            runs += simple_recipes(chosen.model, budget)
    for name, budget, what in runs:
        key = {"name": name, "budget": budget, "seed": seed, "recipe": chosen.recipe, "windows": chosen.windows}
        if any(all(line[k] == v for k, v in key.items()) for line in read(chosen.record)):
            continue
        started = time.process_time()
        extra: dict[str, Any] = {}
        if isinstance(what, str):
            recipe, extra = planned(chosen, overrides, what, budget)
        else:
            base = quantlab.load_recipe(chosen.recipe, overrides).to_dict()
            recipe = quantlab.load_recipe({**base, **what})
        line = {**key, **measure(chosen, recipe), **extra, "cpu": time.process_time() - started}
        with open(chosen.record, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def simple_recipes(model: str, budget: float) -> list[tuple[str, float, dict[str, Any]]]:
    blocks = describe(quantlab.checkpoint.source.open_source(Path(model)).skeleton()).blocks
    found = []
    for higher, count in FIRST_LAST[budget]:
        ends = [*blocks[: count // 2], *blocks[-(count - count // 2) :]]
        layers = {f"{block}.*": {"format": higher} for block in ends}
        found.append((f"ends-{higher}", budget, {"format": BASES[budget], "layers": layers}))
    down = {"format": BASES[budget], "layers": {"*.down_proj": {"format": DOWN[budget]}}}
    return [*found, (f"down-{DOWN[budget]}", budget, down)]


def planned(chosen: argparse.Namespace, overrides: list[str], method: str, budget: float) -> tuple[Any, dict[str, Any]]:
    planning = prepare_planning(chosen.model, recipe=chosen.recipe, overrides=overrides, sensitivity=method)
    weights = sum(planning.task.weights().values())
    formats = [candidate.scheme.format for candidate in planning.task.candidates]

    def uniform(bits: int) -> float:
        return sum(float(costs[formats.index(f"int{bits}")]) for costs in planning.bytes.values())

    limit = uniform(int(budget)) if budget == int(budget) else (uniform(int(budget)) + uniform(int(budget) + 1)) / 2
    found = planning.solve(quantlab.allocation.budget.Budget("bits", 8 * limit / weights))
    known = planning.measured()[0]
    return found.recipe(), {
        "predicted": found.loss,
        "sensitivity_seconds": known.seconds,
        "sensitivity_cpu": known.cpu_seconds,
    }


def measure(chosen: argparse.Namespace, recipe: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        result = quantlab.quantize(chosen.model, recipe, out)
        cpu = time.process_time()
        found = quantlab.evaluate(str(out), chosen.measure, length=2048, windows=chosen.windows)
        shutil.rmtree(out)
    codes = sum(bits_of(report.format) * report.shape[0] * report.shape[1] for report in result.reports)
    weights = sum(report.shape[0] * report.shape[1] for report in result.reports)
    return {
        "ppl": found.perplexity.perplexity,
        "code_bits": codes / weights,
        "bits": result.bits,
        "bytes": sum(report.bytes for report in result.reports),
        "evaluate_cpu": time.process_time() - cpu,
        "quantize_seconds": result.seconds,
    }


def bits_of(name: str) -> int:
    from quantlab.numerics import format_called

    return format_called(name).bits


def read(record: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()] if record.is_file() else []


def report(lines: list[dict[str, Any]], budgets: list[float]) -> None:
    for seed in sorted({line["seed"] for line in lines}):
        mine = [line for line in lines if line["seed"] == seed]
        uniform = {line["budget"]: line["ppl"] for line in mine if line["name"] == "uniform"}
        for budget in budgets:
            at = sorted((line for line in mine if line["budget"] == budget), key=lambda line: line["ppl"])
            for line in at:
                print(f"seed {seed}  {budget}  {line['name']:14} {line['bytes']:>10,} B  {line['ppl']:.3f}")
            plans = [line for line in at if line["name"].startswith("plan")]
            rivals = [line["ppl"] for line in at if not line["name"].startswith("plan")]
            rivals += [uniform[3.0]] if budget == 3.5 and 3.0 in uniform else []
            for line in plans:
                said = (
                    f"{line['name']} {'beats' if rivals and line['ppl'] < min(rivals) else 'does not beat'} the others"
                )
                if budget == 3.5 and {3.0, 4.0} <= set(uniform):
                    closed = (uniform[3.0] - line["ppl"]) / (uniform[3.0] - uniform[4.0])
                    said += f", and closes {closed:.0%} of the gap between uniform 3 and 4 bits"
                print(f"seed {seed}  {budget}  {said}")


if __name__ == "__main__":
    main()
