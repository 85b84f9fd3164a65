"""What each part of the scale search is worth: squared error of a layer relative to abs-max scales.

python benchmarks/scales.py MODEL [LAYER]
"""

from __future__ import annotations

import sys

import torch

from quantlab.checkpoint.resolve import resolve
from quantlab.checkpoint.source import open_source
from quantlab.numerics import QTensor, apply_scales, choose_scales, grid, search


def main(model: str, layer: str = "model.layers.10.mlp.gate_proj") -> None:
    source = open_source(resolve(model))
    skeleton = source.skeleton()
    source.load(skeleton, layer)
    weight = skeleton.get_submodule(layer).weight.float()
    importance = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(0)).pow(4) + 0.01

    def error(name: str, symmetric: bool, searched: bool) -> float:
        table = grid(name)
        scales = choose_scales(
            weight, table, 64, symmetric=symmetric, search=searched, importance=importance if searched else None
        )
        decoded = QTensor.of(apply_scales(weight, table, scales), scales, table).dequantize()
        return float(((weight - decoded).square() * importance).sum())

    both = search._ORIENTATIONS
    for name in ("int4", "int3", "int2"):
        base = error(name, symmetric=True, searched=False)
        full = error(name, symmetric=True, searched=True)
        search._ORIENTATIONS = (1,)
        one = error(name, symmetric=True, searched=True)
        search._ORIENTATIONS = both
        asymmetric = error(name, symmetric=False, searched=True)
        print(
            f"{name}: abs-max 1, searched {full / base:.3f}, searched in one orientation {one / base:.3f}, "
            f"asymmetric searched {asymmetric / base:.3f}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
