"""What the compiler made of every kernel that is shipped, held against what it is meant to be: ``verified.json``.

``python -m quantlab_kernels.gpu.check --write`` compiles everything (about a second a case) and writes the table;
``--all`` compiles everything and compares; without either it compiles a few that stand for the others, as the tests do.
Needs no GPU.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from quantlab_kernels.gpu.cases import ARCHITECTURES, Case, cases, issued
from quantlab_kernels.gpu.offline import SHARED_LIMIT, Compiled

TABLE = Path(__file__).parents[2] / "verified.json"
_SOURCES = ("layout.py", "formats.py", "ptx.py", "decode.py", "gemv.py", "gemm.py", "panels.py", "w8a8.py", "cases.py")
REMEDY = "run `python -m quantlab_kernels.gpu.check --write` and look at the difference"

# What memory should bound and issue slots do: by class and kernel, the formats (with either dtype). Nothing else may.
OVER_BUDGET = {
    ("sm_80", "gemv"): "integer2 integer3 integer4 table16-4 table-6",
    ("sm_80", "gemm"): "integer2 table16-4 table-6",
    ("sm_90", "gemv"): "integer2 integer3 integer4 table16-4 table-6 table16-3",
    ("sm_90", "gemm"): "integer2 table16-4 table-6 table16-3",
    ("sm_100", "gemv"): "integer2 integer3 integer4 integer8 e3m2 e2m3 table16-4 table-6",
    ("sm_100", "gemm"): "integer2 integer3 integer4 integer8 e3m2 e2m3 table16-4 table-6",
    ("gfx942", "gemv"): "integer2 integer3 integer4 e3m2 e2m3 table16-4 table-6",
    ("gfx942", "gemm"): "integer2 integer3 integer4 integer8 e3m2 e2m3 table16-4 table-6",
}
_SPECIAL = {
    *(("gemv", "integer4", "bf16", ""), ("gemm", "integer4", "bf16", "")),
    *(("gemv", "integer3", "fp16", ""), ("gemm", "integer8", "fp16", "")),
    *(("gemv", "e3m2", "fp16", ""), ("gemm", "e2m3", "bf16", "")),
    *(("gemv", "table16-4", "fp16", ""), ("gemm", "table16-4", "bf16", ""), ("gemv", "table-6", "bf16", "")),
    *(
        ("gemv", "integer4", "fp16", "zeros"),
        ("gemm", "integer4", "bf16", "zeros"),
        ("gemv", "integer4", "bf16", "rank"),
    ),
    *(("w8a8", "", "int8", ""), ("w8a8", "", "fp8e4nv", "")),
}

Figures = dict[str, Any]


def figures(case: Case, compiled: Compiled) -> Figures:
    """What is kept of a compiled kernel."""
    found: Figures = {
        "registers": compiled.registers,
        "spilled": compiled.spilled,
        "shared": compiled.shared,
        "wide_loads": compiled.wide_loads,
        "barriers": compiled.barriers,
        "tensor_core": compiled.tensor_core,
    }
    if case.weights:
        found["instructions_per_weight"] = round(issued(case.architecture, compiled) / case.weights, 2)
    return found


def faults(case: Case, compiled: Compiled) -> list[str]:
    """Everything about a compiled kernel that is not as it must be."""
    found = []
    if compiled.spilled:
        found.append(f"spills {compiled.spilled}")
    if compiled.shared > SHARED_LIMIT[case.architecture]:
        found.append(f"takes {compiled.shared} bytes of shared memory of {SHARED_LIMIT[case.architecture]}")
    if compiled.flushes:
        found.append("replaces subnormal numbers by zero")
    if not compiled.tensor_core.startswith(case.tensor_core) or bool(case.tensor_core) != bool(compiled.tensor_core):
        found.append(f"uses {compiled.tensor_core or 'no tensor core'}, not {case.tensor_core or 'none'}")
    if case.format is not None and compiled.wide_loads < case.weight_loads:
        found.append(f"has {compiled.wide_loads} loads of 128 bits and needs {case.weight_loads} for the codes alone")
    if case.kernel == "gemv" and compiled.barriers:
        found.append(f"has {compiled.barriers} barriers in its loop")
    if over_budget(case, figures(case, compiled)) and not known_over_budget(case):
        found.append(f"issues more than the {case.budget:.1f} instructions a weight that there is time for")
    return found


def known_over_budget(case: Case) -> bool:
    """Whether it is said in :data:`OVER_BUDGET`."""
    formats = OVER_BUDGET.get((case.architecture, case.kernel), "").split()
    return case.format is not None and case.format.name in formats


def over_budget(case: Case, found: Figures) -> bool:
    """Whether a kernel that memory should bound issues more instructions than there is time for."""
    return case.budget is not None and found["instructions_per_weight"] > case.budget


def sources() -> str:
    """A hash of what the kernels are compiled from: of the code, not of its comments and docstrings."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        tree = ast.parse(Path(__file__).with_name(name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def representative() -> list[Case]:
    """A few cases that stand for the others: four bits for every class of devices, and what is special on an H100."""
    chosen = []
    for architecture in ARCHITECTURES:
        seen = set()
        for case in cases(architecture):
            kind = (case.kernel, case.format.name if case.format else "", case.dtype, case.variant)
            everywhere = kind in (("gemv", "integer4", "fp16", ""), ("gemm", "integer4", "fp16", ""))
            if kind not in seen and (everywhere or (architecture == "sm_90" and kind in _SPECIAL)):
                chosen.append(case)
            seen.add(kind)  # of several tiles, the first
    return chosen


def read(path: Path = TABLE) -> dict[str, Any]:
    """The checked-in table: ``triton``, ``sources`` and ``cases``."""
    return json.loads(path.read_text(encoding="utf-8"))


def differences(case: Case, found: Figures, kept: dict[str, Figures]) -> list[str]:
    """How a kernel's figures differ from those that are kept."""
    if case.name not in kept:
        return [f"is not in {TABLE.name}: {REMEDY}"]
    before = kept[case.name]
    return [
        f"{name} is {found.get(name)}, was {before.get(name)}: {REMEDY}"
        for name in sorted({*found, *before})
        if found.get(name) != before.get(name)
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    import triton

    parser = argparse.ArgumentParser(prog="python -m quantlab_kernels.gpu.check", description=__doc__)
    parser.add_argument("--write", action="store_true", help="compile everything and write the table")
    parser.add_argument("--all", action="store_true", help="compile everything and compare with the table")
    parser.add_argument("--only", nargs="*", default=ARCHITECTURES, help="these architectures, the others as they are")
    options = parser.parse_args(arguments)
    kept = read() if TABLE.exists() else {"triton": triton.__version__, "cases": {}}
    same = kept["triton"] == triton.__version__
    if not same and not options.write:
        print(f"{TABLE.name} is of triton {kept['triton']}, this is {triton.__version__}: only the rules are checked")
    everything = [case for name in options.only for case in cases(name)]
    chosen = (
        everything if options.all or options.write else [c for c in representative() if c.architecture in options.only]
    )
    bad, new = 0, {}
    for number, case in enumerate(chosen):
        try:
            compiled = case.compile()
        except Exception as error:  # whatever the compiler has to say
            bad += 1
            print(f"{case.name} does not compile: {error}", flush=True)
            continue
        new[case.name] = figures(case, compiled)
        problems = faults(case, compiled)
        if same and not options.write:
            problems += differences(case, new[case.name], kept["cases"])
        bad += bool(problems)
        for problem in problems:
            print(f"{case.name} {problem}", flush=True)
        print(f"\r{number + 1} of {len(chosen)}", end="", file=sys.stderr, flush=True)
    if options.write:
        now = read() if TABLE.exists() else kept  # another process may have written other architectures meanwhile
        others = {
            name: found
            for name, found in now["cases"].items()
            if now["triton"] == triton.__version__ and name.split("/")[0] not in options.only
        }
        table = {"triton": triton.__version__, "sources": sources(), "cases": {**others, **new}}
        TABLE.write_text(_layout(table), encoding="utf-8")
    print(f"{len(chosen)} kernels, {bad} with faults")
    return 1 if bad else 0


def _layout(table: dict[str, Any]) -> str:
    """JSON with one line a case."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(table["cases"].items()))
    head = f' "triton": {json.dumps(table["triton"])},\n "sources": {json.dumps(table["sources"])},\n'
    return "{\n" + head + ' "cases": {\n' + lines + "\n }\n}\n"


if __name__ == "__main__":
    sys.exit(main())
