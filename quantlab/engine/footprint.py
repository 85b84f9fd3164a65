"""How a layer will be stored, before it is quantized: from its scheme and its shape alone."""

from __future__ import annotations

import math

from quantlab.compensation.low_rank import LowRankRepair
from quantlab.engine.solve import PlannedLayer
from quantlab.numerics import scale_type, zero_dtype
from quantlab.storage import Storage, dtype_name


def planned_storage(layer: PlannedLayer, bias: bool = False) -> Storage:
    """What :meth:`Storage.of` will say of the layer.

    Where a repair chooses its rank by the weights (``energy``, ``budget``, ``preserve``), the most that it may take; a
    fitted table is counted full.
    """
    scheme, (rows, columns) = layer.scheme, layer.shape
    form, kind = scheme.known_format, scale_type(scheme.scale_dtype)
    assert form is not None, "a layer that stays as it is has no codes"
    groups = columns // scheme.granularity if isinstance(scheme.granularity, int) else 1
    scale_rows = 1 if scheme.granularity == "tensor" else rows
    count = scale_rows * groups
    repair = layer.compensation if isinstance(layer.compensation, LowRankRepair) else None
    return Storage(
        format=form.name,
        bits=form.bits,
        table_size=2**form.bits if form.grid is None else len(form.grid),
        in_features=columns,
        out_features=rows,
        scale_shape=(scale_rows, groups),
        scale_dtype=dtype_name(kind.dtype),
        zero_dtype=None if scheme.symmetric else dtype_name(zero_dtype(form.grid, kind)),
        low_rank=0 if repair is None else min(repair.rank, *layer.shape),
        low_rank_dtype=None if repair is None else repair.dtype,
        outer_scales=0 if not kind.block else 1 if kind.block < 0 else -(-count // kind.block),
        outer_offset=kind.centered,
        bias=bias,
        activations=scheme.activations,
    )


def stored_bytes(storage: Storage) -> int:
    """Bytes of everything that is stored of a weight; its bias is not."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in storage.specs().values())
