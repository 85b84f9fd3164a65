"""The same problem as a mixed-integer linear program, solved by HiGHS: a check on the knapsack, and what it cannot do.

Further constraints (bytes and latency at once), and losses of pairs of items. A product of two choices is linearised
by a variable for each pair of options whose sums are the two choices,

    sum_l y_kl = x_ik,    sum_k y_kl = x_jl,    y >= 0,

which is the tight relaxation: for two items alone it has no fractional corner.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix, csr_matrix, hstack, vstack

from quantlab.allocation.choices import Choices, InfeasibleError
from quantlab.errors import QuantlabError


def solve(
    choices: Choices,
    budget: float,
    *,
    further: Sequence[tuple[np.ndarray, float]] = (),
    seconds: float | None = None,
    gap: float = 0.0,
) -> tuple[int, ...]:
    """The option of each item that loses least, pairs included, within the budget and all ``further`` ones.

    Args:
        choices: the problem.
        budget: of its costs.
        further: other costs ``[items, options]``, each with its budget.
        seconds: to stop after, with the best choice so far; None: not before the optimum is proved.
        gap: relative distance to the optimum that is near enough.

    Raises:
        InfeasibleError: no choice keeps to the budgets.
        QuantlabError: the time was over before any choice was found.
    """
    choices.refuse_above(budget)
    items, options = choices.losses.shape
    allowed = np.isfinite(choices.losses).ravel()
    size = items * options
    one_each = csr_matrix((np.ones(size), (np.repeat(np.arange(items), options), np.arange(size))))
    pairs = list(choices.pairs.items())
    objective = np.concatenate([np.where(allowed, choices.losses.ravel(), 0.0), *(t.ravel() for _, t in pairs)])
    extra = len(objective) - size
    constraints = [LinearConstraint(_padded(one_each, extra), 1, 1)]
    for costs, limit in [(choices.costs, budget), *further]:
        scale = max(1e-300, float(np.abs(costs[np.isfinite(costs)]).max()))
        row = csr_matrix(np.where(allowed, np.nan_to_num(costs.ravel(), posinf=0), 0)[None] / scale)
        constraints.append(LinearConstraint(_padded(row, extra), -np.inf, limit / scale))
    if pairs:
        constraints.append(LinearConstraint(_links([pair for pair, _ in pairs], options, size), 0, 0))
    scale = max(1e-300, float(np.abs(objective).max()))
    result = milp(
        objective / scale,
        constraints=constraints,
        integrality=np.concatenate([np.ones(size), np.zeros(extra)]),
        bounds=Bounds(0, np.concatenate([allowed.astype(float), np.ones(extra)])),
        options={"mip_rel_gap": gap, **({} if seconds is None else {"time_limit": seconds})},
    )
    if result.status == 2:
        raise InfeasibleError("no choice keeps to all budgets at once", choices.cheapest())
    if result.x is None:
        raise QuantlabError(f"the solver found no choice ({result.message}); give it more time, or use the knapsack")
    return tuple(int(option) for option in result.x[:size].reshape(items, options).argmax(1))


def _padded(matrix: csr_matrix, extra: int) -> csr_matrix:
    return hstack([matrix, csr_matrix((matrix.shape[0], extra))]).tocsr() if extra else matrix


def _links(pairs: list[tuple[int, int]], options: int, size: int) -> csr_matrix:
    """Rows that tie each pair's variables to the choices of its two items."""
    k, l = (index.ravel() for index in np.indices((options, options)))  # noqa: E741
    blocks = []
    for number, (i, j) in enumerate(pairs):
        columns = size + number * options**2 + np.arange(options**2)
        rows = np.concatenate([k, options + l, np.arange(2 * options)])
        places = np.concatenate([columns, columns, i * options + np.arange(options), j * options + np.arange(options)])
        values = np.concatenate([np.ones(2 * options**2), -np.ones(2 * options)])
        shape = (2 * options, size + len(pairs) * options**2)
        blocks.append(coo_matrix((values, (rows, places)), shape=shape))
    return vstack(blocks).tocsr()
