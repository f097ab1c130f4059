"""What the planners take and give: demand in, plan out. Pure values, with the JSON of `migserve plan`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class PlanError(ValueError):
    """A demand that cannot be planned for. The message says what binds and what would do."""


class DemandError(ValueError):
    """A demand that cannot be read. The message names the line, or the value."""


@dataclass(frozen=True, slots=True)
class ModelDemand:
    """What is asked of one model: queries per second, each to be answered within `slo_ms`.

    `items`: share of queries by how many items they carry. Raises DemandError where a number makes no sense.
    """

    model: str
    rate_per_s: float
    slo_ms: float
    items: Mapping[int, float] = field(default_factory=lambda: {1: 1.0})

    def __post_init__(self) -> None:
        for name, value in (("rate_per_s", self.rate_per_s), ("slo_ms", self.slo_ms)):
            if not (value > 0 and math.isfinite(value)):
                raise DemandError(f"{self.model}: {name} must be a positive number, not {value:g}")
        total = sum(self.items.values())
        if total <= 0 or any(count < 1 or share < 0 for count, share in self.items.items()):
            raise DemandError(f"{self.model}: items per query must be at least 1, their shares positive")
        if abs(total - 1) > 1e-9:
            shares = {count: share / total for count, share in self.items.items()}
            object.__setattr__(self, "items", shares)

    @property
    def items_per_query(self) -> float:
        """Mean."""
        return sum(count * share for count, share in self.items.items())


@dataclass(frozen=True, slots=True)
class ModelShare:
    """What a slice does for one model: gangs of at most `processes` batches of at most `batch` items.

    `rate_per_s`: queries the plan has it serve; `share`: of the slice's time, that they take.
    """

    model: str
    batch: int
    processes: int
    rate_per_s: float
    share: float


@dataclass(frozen=True, slots=True)
class PlannedSlice:
    """A slice of a planned GPU. `start` is its first memory slice; `models` are all that it may serve."""

    mig_profile: str
    start: int
    gpcs: int
    models: tuple[ModelShare, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """How every GPU is cut, and what each slice serves.

    `bound_gpus`: GPUs, in fractions, below which no plan can go (the fluid bound, see `optimal.fluid_bound`).
    `solve_seconds`: filled in by whoever has a clock. `explanation`: sentences, the most important first.
    `warnings`: why it may not hold where it is meant for, by whoever read the latencies.
    """

    gpus: tuple[tuple[PlannedSlice, ...], ...]
    bound_gpus: float = 0.0
    solve_seconds: float = 0.0
    explanation: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def gpcs(self) -> int:
        """Compute slices that serve something."""
        return sum(each.gpcs for each in self.slices if each.models)

    @property
    def slices(self) -> list[PlannedSlice]:
        """Every slice, GPU by GPU."""
        return [each for gpu in self.gpus for each in gpu]

    def layouts(self) -> list[str]:
        """Each GPU's slices as `partitioner.geometry.parse_layout` reads them: `4g.40gb+2g.20gb+1g.10gb`."""
        return ["+".join(each.mig_profile for each in gpu) for gpu in self.gpus]

    def to_json(self) -> dict[str, Any]:
        """As `migserve plan --json` prints it; docs/planning.md says what each field means."""
        return {
            "gpus": len(self.gpus),
            "gpcs": self.gpcs,
            "layout": [[_slice_json(each) for each in gpu] for gpu in self.gpus],
            "bound_gpus": round(self.bound_gpus, 3),
            "solve_seconds": round(self.solve_seconds, 3),
            "explanation": list(self.explanation),
            "warnings": list(self.warnings),
        }


def plan_from_json(data: Mapping[str, Any]) -> Plan:
    """The plan that `Plan.to_json` wrote. Raises PlanError."""
    try:
        return Plan(
            gpus=tuple(tuple(_slice_from_json(each) for each in gpu) for gpu in data["layout"]),
            bound_gpus=float(data["bound_gpus"]),
            solve_seconds=float(data["solve_seconds"]),
            explanation=tuple(data["explanation"]),
            warnings=tuple(data.get("warnings", ())),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"not a plan of migserve: {error!r}") from error


def _slice_json(planned: PlannedSlice) -> dict[str, Any]:
    return {
        "mig_profile": planned.mig_profile,
        "start": planned.start,
        "models": [
            {
                "model": each.model,
                "batch": each.batch,
                "processes": each.processes,
                "rate_per_s": round(each.rate_per_s, 3),
                "share": round(each.share, 4),
            }
            for each in planned.models
        ],
    }


def _slice_from_json(data: Mapping[str, Any]) -> PlannedSlice:
    name = str(data["mig_profile"])
    return PlannedSlice(
        mig_profile=name,
        start=int(data["start"]),
        gpcs=int(name.split("g")[0]),
        models=tuple(ModelShare(**each) for each in data["models"]),
    )
