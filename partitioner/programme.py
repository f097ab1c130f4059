"""Integer programmes, built term by term and solved by HiGHS, through scipy. Pure: same input, same answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint

# Good enough: within half a per cent of the optimum, or what the search has found after so many nodes. A limit on nodes
# keeps the answer the same on any machine; the limit on time is for a machine that is far too slow.
RELATIVE_GAP, MAX_NODES, TIME_LIMIT_S = 0.005, 500, 60.0


class InfeasibleError(ValueError):
    """No values satisfy every constraint, or none were found within the limits."""


class Programme:
    """Minimises the sum of cost * variable; every variable is at least 0."""

    def __init__(self) -> None:
        self._costs: list[float] = []
        self._integer: list[bool] = []
        self._upper: list[float] = []
        self._rows: list[tuple[Mapping[int, float], float, float]] = []

    def variable(self, cost: float = 0.0, *, integer: bool = False, upper: float = math.inf) -> int:
        """A new variable; what comes back is its index in the solution."""
        self._costs.append(cost)
        self._integer.append(integer)
        self._upper.append(upper)
        return len(self._costs) - 1

    def constrain(self, terms: Mapping[int, float], low: float = -math.inf, high: float = math.inf) -> None:
        """Requires low <= sum of factor * variable <= high; `terms` are the factors by variable."""
        self._rows.append((terms, low, high))

    def solve(self) -> list[float]:
        """A value for every variable; integer ones are whole. Raises InfeasibleError."""
        # Imported here: it takes a third of a second, and most daemons never plan.
        from scipy.optimize import Bounds, milp

        result = milp(
            np.array(self._costs),
            integrality=np.array(self._integer, dtype=int),
            bounds=Bounds(0.0, np.array(self._upper)),
            constraints=self._constraints(),
            options={"mip_rel_gap": RELATIVE_GAP, "node_limit": MAX_NODES, "time_limit": TIME_LIMIT_S},
        )
        if result.x is None:
            raise InfeasibleError(result.message)
        pairs = zip(result.x.tolist(), self._integer, strict=True)
        return [float(round(value)) if integer else max(value, 0.0) for value, integer in pairs]

    def _constraints(self) -> list[LinearConstraint]:
        from scipy.optimize import LinearConstraint
        from scipy.sparse import csr_array

        if not self._rows:
            return []
        rows = [index for index, (terms, _, _) in enumerate(self._rows) for _ in terms]
        columns = [column for terms, _, _ in self._rows for column in terms]
        factors = [factor for terms, _, _ in self._rows for factor in terms.values()]
        matrix = csr_array((factors, (rows, columns)), shape=(len(self._rows), len(self._costs)))
        return [LinearConstraint(matrix, [low for _, low, _ in self._rows], [high for _, _, high in self._rows])]
