"""From the layout that a GPU has to the one it should have: what stays, and in which order the rest goes. Pure.

A slice stays if the target has the same MIG profile at the same place, so placements are chosen to match what is
there. The rest changes in rounds, each possible after the one before, those first that cost the least capacity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from partitioner.geometry import GpuModel, Layout, MigProfile, PlacedProfile, check, is_legal, place


@dataclass(frozen=True, slots=True)
class Round:
    """Slices that go together, and those that then come in their place. Either may be empty, not both."""

    destroy: Layout
    create: Layout


@dataclass(frozen=True, slots=True)
class Transition:
    """The change of one GPU. `kept` slices serve on all the time."""

    kept: Layout
    rounds: tuple[Round, ...]

    @property
    def touched(self) -> int:
        """Slices that are destroyed or created."""
        return sum(len(each.destroy) + len(each.create) for each in self.rounds)

    def serving_gpcs(self) -> tuple[int, ...]:
        """Compute slices that serve while each round is under way: what is to go has gone, nothing has come yet."""
        now = _gpcs(self.kept) + sum(_gpcs(each.destroy) for each in self.rounds)
        serving = []
        for each in self.rounds:
            now -= _gpcs(each.destroy)
            serving.append(now)
            now += _gpcs(each.create)
        return tuple(serving)


def transition(current: Layout, target: Layout, gpu: GpuModel) -> Transition:
    """The rounds from `current` to `target`, both legal on `gpu`. Raises IllegalLayoutError."""
    check(target, gpu)
    kept = tuple(each for each in current if each in target)
    going = [each for each in current if each not in target]
    coming = [each for each in target if each not in current]
    return Transition(kept, tuple(_rounds(kept, going, coming, gpu)))


def arrange(current: Layout, wanted: Sequence[MigProfile], gpu: GpuModel) -> Layout:
    """Places `wanted` so that as many slices of `current` as can be, then as many of their GPCs, stay as they are.

    Raises IllegalLayoutError if they cannot be placed at all.
    """
    best = place(wanted, gpu)
    best_score = _score(best, current)
    for layout in _arrangements(sorted(wanted, key=lambda each: (-each.placements[0].size, each.enum)), ()):
        score = _score(layout, current)
        if score > best_score:
            best, best_score = layout, score
    return tuple(sorted(best, key=lambda placed: placed.placement.start))


def cheapest_assignment(costs: Sequence[Sequence[int]]) -> list[int]:
    """Which target each GPU gets, `costs[gpu][target]` summing to the least (scipy's Hungarian method)."""
    from scipy.optimize import linear_sum_assignment

    _, targets = linear_sum_assignment(costs)
    return [int(target) for target in targets]


def _score(layout: Layout, current: Layout) -> tuple[int, int]:
    kept = [each for each in layout if each in current]
    return len(kept), _gpcs(kept)


def _arrangements(wanted: Sequence[MigProfile], placed: Layout) -> Iterator[Layout]:
    """Every placement without overlap; slices of one MIG profile from left to right, so that none comes twice."""
    if not wanted:
        yield placed
        return
    first, *rest = wanted
    before = placed[-1].placement.start if placed and placed[-1].profile == first else -1
    for placement in first.placements:
        if placement.start > before and not any(placement.overlaps(other.placement) for other in placed):
            yield from _arrangements(rest, (*placed, PlacedProfile(first, placement)))


def _rounds(kept: Layout, going: list[PlacedProfile], coming: list[PlacedProfile], gpu: GpuModel) -> Iterator[Round]:
    there = [*kept, *going]
    while coming:
        destroy = min((_in_the_way(each, there, going, gpu) for each in coming), key=lambda way: (_gpcs(way), len(way)))
        there = [each for each in there if each not in destroy]
        going = [each for each in going if each not in destroy]
        create: list[PlacedProfile] = []
        for each in coming:
            if is_legal([*there, *create, each], gpu):
                create.append(each)
        there += create
        coming = [each for each in coming if each not in create]
        yield Round(tuple(destroy), tuple(create))
    if going:
        yield Round(tuple(going), ())


def _in_the_way(
    wanted: PlacedProfile, there: Sequence[PlacedProfile], going: Sequence[PlacedProfile], gpu: GpuModel
) -> list[PlacedProfile]:
    """What has to go before `wanted` can come: what overlaps it, and small ones until the other rules hold."""
    way = [each for each in going if each.placement.overlaps(wanted.placement)]
    rest = sorted((each for each in going if each not in way), key=lambda each: each.profile.gpcs)
    while rest and not is_legal([*(each for each in there if each not in way), wanted], gpu):
        way.append(rest.pop(0))
    return way


def _gpcs(layout: Sequence[PlacedProfile]) -> int:
    return sum(each.profile.gpcs for each in layout)
