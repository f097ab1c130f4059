"""The policies by the names that settings and journals know them by. Pure."""

from __future__ import annotations

from collections.abc import Callable

from scheduler.domain import Pool
from scheduler.policies import Policy
from scheduler.policies.elsa import Elsa
from scheduler.policies.pool import LateLanePool

POLICIES: dict[str, Callable[[Pool], Policy]] = {"pool": LateLanePool, "elsa": Elsa}
