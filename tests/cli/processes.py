"""The command in a process of its own, and what it is given."""

from __future__ import annotations

import os
import subprocess
import sys

TEXT = "\n".join(
    f"The {adjective} {noun} {verb} over line {number}, and nobody knows why."
    for number, (adjective, noun, verb) in enumerate(
        [("quick", "fox", "jumps"), ("lazy", "dog", "sleeps"), ("small", "model", "predicts")] * 60
    )
)
QUICK = ["--samples", "4", "--length", "32"]


def run_process(*arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, "-m", "quantlab.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
