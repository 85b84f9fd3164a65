"""The figures of ``verified.json`` as tables in ``docs/kernels-gpu.md``: ``python -m quantlab_kernels.gpu.report``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantlab_kernels.gpu.cases import ARCHITECTURES, FORMATS, FURTHER_FORMATS, GROUP, PEAKS, Case, cases
from quantlab_kernels.gpu.check import Figures, over_budget, read

PAGE = Path(__file__).parents[3] / "docs" / "kernels-gpu.md"
_START, _END = "<!-- figures: python -m quantlab_kernels.gpu.report -->", "<!-- end of figures -->"


def markdown(kept: dict[str, Any]) -> str:
    """All tables of the page."""
    known = {case.name: case for name in ARCHITECTURES for case in cases(name)}
    found = [(known[name], figures) for name, figures in kept["cases"].items() if name in known]
    return "\n\n".join(
        [
            f"Compiled with triton {kept['triton']}: {len(found)} kernels, none with spills or stack.",
            "**Issue slots a weight** that a device has in the time in which its memory brings the weight, with a "
            f"16-bit scale for {GROUP}:\n\n" + _budgets(),
            "**Instructions a weight, one row of activations** (GEMV, float16 / bfloat16; in **bold** where they are "
            "more than the device has slots for, so that it and not memory is the limit):\n\n"
            + _per_weight(found, "gemv"),
            "**Instructions a weight, 2 to 16 rows** (tensor-core tile, float16 / bfloat16):\n\n"
            + _per_weight(found, "gemm"),
            "**Every tile**: most registers of any format, most shared memory, and the tensor-core instruction:\n\n"
            + _tiles(found),
        ]
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _budgets() -> str:
    widths = sorted({format.bits for format in FORMATS})
    rows = [
        [f"{name}, {peak.name}", *(f"{peak.budget(bits / 8 + 2 / GROUP):.1f}" for bits in widths)]
        for name, peak in PEAKS.items()
    ]
    return _table(["device", *(f"{bits} bits" for bits in widths)], rows)


def _per_weight(found: list[tuple[Case, Figures]], kernel: str) -> str:
    def figure(case: Case, figures: Figures) -> str:
        text = f"{figures['instructions_per_weight']:.1f}"
        return f"**{text}**" if over_budget(case, figures) else text

    cells: dict[tuple[str, str], dict[str, str]] = {}
    for case, figures in found:
        if case.kernel == kernel and case.budget is not None and case.format is not None and not case.variant:
            cells.setdefault((case.format.name, case.architecture), {})[case.dtype] = figure(case, figures)
    rows = []
    for format in sorted((*FORMATS, *FURTHER_FORMATS), key=lambda format: (format.decode, format.bits)):
        entries = [cells.get((format.name, name), {}) for name in ARCHITECTURES]
        rows.append(
            [
                format.name,
                *(" / ".join(entry[dtype] for dtype in ("fp16", "bf16") if dtype in entry) for entry in entries),
            ]
        )
    return _table(["format", *ARCHITECTURES], rows)


def _tiles(found: list[tuple[Case, Figures]]) -> str:
    groups: dict[tuple[str, str, str], list[Figures]] = {}
    for case, figures in found:
        if case.config is not None:
            kind = case.dtype if case.kernel == "w8a8" else "16-bit"
            tile = "x".join(str(value) for value in vars(case.config).values() if value)
            groups.setdefault((case.architecture, f"{case.kernel} {kind}", tile), []).append(figures)
    rows = [
        [
            *(
                architecture,
                kernel,
                tile,
                str(max(f["registers"] for f in figures)),
                str(max(f["shared"] for f in figures)),
            ),
            ", ".join(sorted({f["tensor_core"] for f in figures} - {""})) or "-",
        ]
        for (architecture, kernel, tile), figures in sorted(
            groups.items(), key=lambda item: (ARCHITECTURES.index(item[0][0]), item[0][1:])
        )
    ]
    return _table(["class", "kernel", "tile", "registers", "shared memory", "tensor core"], rows)


def with_figures(page: str, kept: dict[str, Any]) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: the page has no place for them.
    """
    before, start, rest = page.partition(_START)
    _, end, after = rest.partition(_END)
    if not start or not end:
        raise ValueError(f"no place for figures: a line {_START!r} and, below it, a line {_END!r}")
    return f"{before}{start}\n{markdown(kept)}\n{end}{after}"


def main() -> int:
    """The command."""
    PAGE.write_text(with_figures(PAGE.read_text(encoding="utf-8"), read()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
