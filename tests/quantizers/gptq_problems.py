"""A problem for GPTQ, the schemes that it is solved under, and the papers' algorithms as loops over float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from synthetic import NF4, TableScheme, array, inputs, problem, statistics, weights

from quantlab.numerics import QTensor
from quantlab.problem import InputStatistics
from quantlab.quantizers.gptq import Gptq
from quantlab.recipe import Scheme

ORDERS = ["activation", "group-aware", "natural"]
SCHEMES = {
    "grouped": Scheme(granularity=8, scale_dtype="float32"),
    "channel": Scheme(granularity="channel"),
    "tensor": Scheme(granularity="tensor", scale_search="mse"),
    "absmax": Scheme(format="int3", granularity=8, scale_search="absmax"),
    "asymmetric": Scheme(format="int3", granularity=8, symmetric=False),
    "table": TableScheme(table=NF4, granularity=8),
    "asymmetric-table": TableScheme(table=NF4, granularity=8, symmetric=False),
}
each_order = pytest.mark.parametrize("order", ORDERS)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())

ROWS, COLUMNS = 12, 32
W = weights(ROWS, COLUMNS)
X = inputs(400, COLUMNS)


def solve(weight=W, x=X, scheme=SCHEMES["grouped"], **options):
    kept = x if isinstance(x, InputStatistics) else statistics(x)
    return Gptq(**options).quantize(problem(weight, kept), scheme)


# --- the papers ---

# (column, the weight to be rounded and its code in ours [out]) -> the code of the reference.
Round = Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]]


def rounding_of(q: QTensor) -> Round:
    """To nearest under the scales of ``q``: codes and values of a column. Numbers within 0.1 % of a step of a
    tie are rounded as ``q`` has them, for float32 may fall on the other side."""
    columns = q.shape[1]
    size = columns // q.scales.shape[1]
    scales = array(q.scales.expand(q.shape[0], -1))
    zeros = 0 * scales if q.zeros is None else array(q.zeros.expand(q.shape[0], -1))
    table = array(q.grid.values)

    def nearest(column: int, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale, zero = scales[:, column // size], zeros[:, column // size]
        codes = np.empty(len(w), dtype=int)
        for row in range(len(w)):
            distance = np.abs(table - (w[row] / scale[row] + zero[row]))
            codes[row] = distance.argmin()
            ours = int(q.codes[row, column])
            if distance[ours] - distance[codes[row]] < 1e-3 * np.diff(table).min():
                codes[row] = ours
        return codes, (table[codes] - zero) * scale

    return nearest


def naive_gptq(w: np.ndarray, h: np.ndarray, order: np.ndarray, damping: float, nearest: Round) -> np.ndarray:
    """Frantar et al., algorithm 1 without its blocks: e / U_ii propagated, U^T U the inverse."""
    n = len(order)
    w, h = w[:, order].copy(), h[np.ix_(order, order)]
    inverse = np.linalg.inv(h + damping * np.diag(h).mean() * np.eye(n))
    upper = np.linalg.cholesky(inverse).T
    codes = np.empty(w.shape, dtype=int)
    for i in range(n):
        codes[:, i], value = nearest(order[i], w[:, i])
        error = (w[:, i] - value) / upper[i, i]
        for j in range(i, n):
            w[:, j] -= error * upper[i, j]
    out = np.empty_like(codes)
    out[:, order] = codes
    return out


def naive_ldlq(w: np.ndarray, h: np.ndarray, order: np.ndarray, damping: float, nearest: Round) -> np.ndarray:
    """Chee et al.: H = M D M^T, M unit upper triangular, by elimination from the end; then feedback."""
    n = len(order)
    w, h = w[:, order], h[np.ix_(order, order)]
    h = h + damping * np.diag(h).mean() * np.eye(n)
    m, d = np.eye(n), np.zeros(n)
    for k in range(n - 1, -1, -1):
        d[k] = h[k, k] - sum(m[k, j] ** 2 * d[j] for j in range(k + 1, n))
        for i in range(k):
            m[i, k] = (h[i, k] - sum(m[i, j] * d[j] * m[k, j] for j in range(k + 1, n))) / d[k]
    codes, values = np.empty(w.shape, dtype=int), np.empty(w.shape)
    for k in range(n):
        feedback = sum(((w[:, j] - values[:, j]) * m[j, k] for j in range(k)), np.zeros(len(w)))
        codes[:, k], values[:, k] = nearest(order[k], w[:, k] + feedback)
    out = np.empty_like(codes)
    out[:, order] = codes
    return out
