"""A plan for a time, and the time that its model takes: predicted and measured step, in turns with the original.

    python benchmarks/plan_latency.py MODEL --calibrate wikitext2.valid.txt --share 0.6

The budget is a share of the original's step. Layers are rounded to nearest: what they weigh counts, not what they lose.
Run it on an idle machine: kernels are timed first, the result some minutes later.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from quantlab_evals import SpeedSettings, measure_speed

import quantlab
from quantlab.allocation.budget import Budget
from quantlab.planning import prepare_planning


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("--calibrate", required=True)
    options.add_argument("--share", type=float, action="append")
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    overrides = [f"calibration.source={chosen.calibrate}", "calibration.samples=8", "granularity=64"]
    candidates = "formats=int3,int4,int6,int8"
    planning = prepare_planning(
        chosen.model, recipe="w4-rtn", overrides=overrides, candidates=candidates, keep=True, device="here"
    )
    original = planning.latency.fixed + sum(float(seconds[-1]) for seconds in planning.latency.by_layer.values())
    for share in chosen.share or [0.9, 0.8]:
        plan = planning.solve(Budget("seconds", share * original))
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            quantlab.quantize(chosen.model, plan.recipe(), out)
            loaded = {"original": quantlab.load(chosen.model), "planned": quantlab.load(out)}
            speeds = measure_speed(loaded, SpeedSettings(32, 16, rounds=7, compiled=False))
        step = {speed.name: speed.best(1).step.median for speed in speeds.models}
        predicted = plan.cost + plan.fixed_cost
        line = {
            "share": share,
            "original_predicted_ms": 1e3 * original,
            "original_measured_ms": 1e3 * step["original"],
            "predicted_ms": 1e3 * predicted,
            "measured_ms": 1e3 * step["planned"],
            "off": step["planned"] / predicted - 1,
            "bits": plan.bits,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
