"""The policies by the names that settings and journals know them by. Pure."""

from __future__ import annotations

from collections.abc import Callable

from scheduler.domain import Pool
from scheduler.policies import Policy
from scheduler.policies.elsa import Elsa
from scheduler.policies.fifs import FirstIdle
from scheduler.policies.jsq import ShortestQueue
from scheduler.policies.marginal import MarginalCost
from scheduler.policies.preba import Preba
from scheduler.policies.static import StaticBatching

POLICIES: dict[str, Callable[[Pool], Policy]] = {
    "fifs": FirstIdle,
    "jsq": ShortestQueue,
    "static": StaticBatching,
    "preba": Preba,
    "elsa": Elsa,
    "marginal": MarginalCost,
}
DEFAULT = "elsa"
