"""The policies by the names that settings and journals know them by; the first is the default. Pure."""

from __future__ import annotations

from collections.abc import Callable

from scheduler.domain import Pool
from scheduler.policies import Policy
from scheduler.policies.elsa import Elsa
from scheduler.policies.fifs import FirstIdle
from scheduler.policies.jsq import ShortestQueue
from scheduler.policies.marginal import MarginalCost
from scheduler.policies.pool import OnePool
from scheduler.policies.preba import Preba
from scheduler.policies.static import StaticBatching

POLICIES: dict[str, Callable[[Pool], Policy]] = {
    "pool": OnePool,
    "elsa": Elsa,
    "marginal": MarginalCost,
    "preba": Preba,
    "static": StaticBatching,
    "jsq": ShortestQueue,
    "fifs": FirstIdle,
}
