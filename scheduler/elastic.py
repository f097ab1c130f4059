"""Which slices a batch job holds now, and what it runs there. Pure: times are arguments, in ns.

ElasticBatch (TPDS 35(10), 2024; only its abstract is public) says that jobs meet their SLO on as few slices as
possible; how is ours:
1. Online work goes first (`background.py`), and waits for one batch of a job at most. How long that may take follows
   from the SLOs of what its slice serves online, and how many others serve it (`patience_ns`); within that it is the
   one with the most items per time.
2. What is left of a job, by length bucket, is spread over slices so that it takes the least GPC-time and ends by the
   deadline, where GPC-time of the largest slices counts a tenth more, since these are where online work goes first: a
   linear programme, over slices that are alike together, each with the share of its time that online work
   leaves. The job holds so many slices as carry that on average until its deadline, rounded up: so it runs ahead, and
   gives slices back, or falls behind, and takes more.
3. Of several jobs the earliest deadline is served first; the others have what that leaves, in time, of every slice.
   One that cannot make its deadline any more comes after those that can: under overload the earliest deadline first
   would make all of them late (Locke, "Best-effort decision making for real-time scheduling", 1986).
4. A job that cannot make it holds everything. When it could end at the earliest is found by bisection over deadlines.
   One without a deadline holds half of the slices, the smaller ones: online queries find another that is free.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import linprog

from scheduler.domain import BatchTable

Bucket = Any  # whatever can be a key, and compared as text

# Rule 1: so much of its SLO a query may wait for jobs in the mean; where nobody has an SLO, batches may take so long.
SLO_SHARE = 0.1
WITHOUT_SLO_NS = 100e6
# One that is no longer than a lone item by more than this may always be.
LONE = 1.25
# Rule 2 plans to be ready so much earlier, of the time that is left; and one decision more, for what goes wrong last.
EARLY, EARLY_NS = 0.02, 1e9
# A slice is given back when the others carry so much more than what is needed.
SPARE = 1.03
# Online work of so long ago counts an e-th.
TAU_NS = 10e9
# Online work goes to the largest slices first: where a smaller one costs hardly more it is the one for a job.
LARGE = 0.1
# A job that would be late by less than this, of the time that is left, keeps its turn: forecasts err so much.
BARELY_LATE = 0.05
# Nobody holds a slice that online work leaves less of.
LEAST_IDLE = 0.02
# The earliest end is found to this share.
PRECISION = 0.01
FOREVER_NS = 1e18


@dataclass(frozen=True, slots=True)
class Place:
    """A slice as a job sees it. `idle`: share of its time that online work leaves.

    `batches[bucket]`: items of the batch that it would run there, and the ns that this takes.
    """

    worker_id: int
    gpcs: int
    idle: float
    batches: Mapping[Bucket, tuple[int, float]]

    @property
    def likeness(self) -> tuple[object, ...]:
        """Equal for slices on which the same work takes the same time, to a few per cent."""
        paces = ((bucket, items, round(math.log(ns) * 16)) for bucket, (items, ns) in self.batches.items())
        return self.gpcs, *sorted(paces, key=repr)


@dataclass(frozen=True, slots=True)
class Work:
    """What is left of a job: items by bucket, and the ns to its deadline, below 0 once that has passed.

    An infinite time is none: the job comes after all others, and takes half of what there is.
    """

    job: str
    left: Mapping[Bucket, float]
    within_ns: float


@dataclass(frozen=True, slots=True)
class Holding:
    """A job's part. `planned[worker_id][bucket]`: ns of that slice's time until the deadline; its keys are held.

    `ends_ns`: from now, as it is held; the earliest that is possible where the job is not `feasible`. `gpc_ns`: that
    it still takes.
    """

    planned: Mapping[int, Mapping[Bucket, float]]
    feasible: bool
    ends_ns: float
    gpc_ns: float


def patience_ns(slo_ns: float, servers: int) -> float:
    """Rule 1: how long a job's batch may be on a slice that, with so many in all, serves a model with this SLO.

    A query that finds all of them busy with such batches, each for a time that is anywhere between nothing and the
    whole, waits for an n + 1st of it in the mean: a tenth of its SLO.
    """
    return min(SLO_SHARE * (servers + 1), 1.0) * slo_ns


def batch_for(table: BatchTable, limit_ns: float | None, factor: float = 1.0) -> tuple[int, float]:
    """Rule 1: items of a job's batch, and its ns. `factor`: of this bucket's times over the table's."""
    limit_ns = (WITHOUT_SLO_NS if limit_ns is None else limit_ns) / factor
    items = table.best[table.largest_within(max(limit_ns, LONE * table.ns[1]))]
    return items, table.ns[items] * factor


def decide(
    works: Sequence[Work], places: Mapping[str, Sequence[Place]], held: Mapping[str, Collection[int]]
) -> dict[str, Holding]:
    """Who holds what from now on. `places`: by job, of the same slices; `held`: until now."""
    holdings: dict[str, Holding] = {}
    used_ns: dict[int, float] = {}  # by worker, by jobs that come sooner
    taken: set[int] = set()
    usable = {job: [place for place in of if place.idle >= LEAST_IDLE and place.batches] for job, of in places.items()}

    def serve(work: Work, there: list[Place], spent_ns: dict[int, float]) -> None:
        holdings[work.job] = _hold(work, there, spent_ns, taken, held.get(work.job, ()))
        taken.update(holdings[work.job].planned)

    in_turn = sorted(works, key=lambda each: (each.within_ns, each.job))
    hopeless = []
    for work in in_turn:
        if math.isinf(work.within_ns):
            continue
        if _is_hopeless(work, usable[work.job], used_ns):
            hopeless.append(work)
        else:
            serve(work, usable[work.job], used_ns)
    for work in hopeless:
        vacant = [place for place in usable[work.job] if place.worker_id not in taken]
        if not vacant:
            serve(work, usable[work.job], used_ns)
            continue
        # All of their time: what is used is spread over slices that are alike, also over those that nobody holds.
        own_ns: dict[int, float] = {}
        serve(work, vacant, own_ns)
        for worker_id, ns in own_ns.items():
            used_ns[worker_id] = used_ns.get(worker_id, 0.0) + ns
    for work in in_turn:
        if math.isinf(work.within_ns):
            serve(work, usable[work.job], used_ns)
    return holdings


def _is_hopeless(work: Work, usable: Sequence[Place], used_ns: Mapping[int, float]) -> bool:
    """Rule 3: it cannot end in time on what jobs that are due sooner leave."""
    left = _items_left(work)
    if not left or not usable:
        return False
    return _cheapest(left, _groups(usable), used_ns, (1 + BARELY_LATE) * work.within_ns) is None


def _items_left(work: Work) -> dict[Bucket, float]:
    return {bucket: items for bucket, items in work.left.items() if items > 0}


def _hold(
    work: Work, usable: Sequence[Place], used_ns: dict[int, float], taken: set[int], held: Collection[int]
) -> Holding:
    left = _items_left(work)
    if not left or not usable:
        return Holding({}, not left, 0.0 if not left else FOREVER_NS, 0.0)
    undated = math.isinf(work.within_ns)  # it comes after all others, and is never late
    if undated:
        usable = sorted(usable, key=lambda each: (each.gpcs, each.worker_id))[: (len(usable) + 1) // 2]
    groups = _groups(usable)
    for within_ns in () if undated else ((1 - EARLY) * work.within_ns - EARLY_NS, work.within_ns):
        plan = _cheapest(left, groups, used_ns, within_ns)
        if plan is not None:
            return _staffed(plan, groups, used_ns, taken, held, within_ns)
    earliest_ns = _earliest(left, groups, used_ns, 1e6 if undated else max(work.within_ns, 1e6))
    plan = _cheapest(left, groups, used_ns, earliest_ns)
    if plan is None:
        return Holding({}, undated, FOREVER_NS, 0.0)
    holding = _staffed(plan, groups, used_ns, taken, held, earliest_ns)
    return replace(holding, feasible=undated, ends_ns=earliest_ns)


def _groups(places: Sequence[Place]) -> list[list[Place]]:
    groups: dict[tuple[object, ...], list[Place]] = {}
    for place in places:
        groups.setdefault(place.likeness, []).append(place)
    return list(groups.values())


def _free_ns(group: Sequence[Place], used_ns: Mapping[int, float], within_ns: float) -> float:
    return sum(max(place.idle * within_ns - used_ns.get(place.worker_id, 0.0), 0.0) for place in group)


def _cheapest(
    left: Mapping[Bucket, float], groups: Sequence[Sequence[Place]], used_ns: Mapping[int, float], within_ns: float
) -> list[dict[Bucket, float]] | None:
    """Rule 2: ns by group and bucket, with the least GPC-time; None if there is not enough time."""
    if within_ns <= 0:
        return None
    free_ns = np.array([_free_ns(group, used_ns, within_ns) for group in groups])
    buckets = list(left)
    per_item = np.array([[_item_ns(group[0], bucket) for bucket in buckets] for group in groups])
    worth = np.array([_worth(group, groups) for group in groups])
    if len(buckets) == 1:
        return _cheapest_of_one(buckets[0], left[buckets[0]], per_item[:, 0], worth, free_ns)
    # Variables: ns of each group for each bucket, in units of the time there is.
    size = len(groups) * len(buckets)
    # Without the groups that have no time: what the solver takes for 0 may be enough for a few items.
    there = np.repeat(free_ns > 0, len(buckets))
    if not there.any():
        return None
    cost = np.repeat(worth, len(buckets))
    of_group = np.kron(np.eye(len(groups)), np.ones(len(buckets)))
    done = np.zeros((len(buckets), size))
    for index in range(len(buckets)):
        done[index, index :: len(buckets)] = within_ns / per_item[:, index] / left[buckets[index]]
    limits, all_done = free_ns / within_ns, np.ones(len(buckets))
    found = linprog(cost[there], of_group[:, there], limits, done[:, there], all_done, method="highs")
    if found.status != 0:
        return None
    ns = np.zeros(size)
    ns[there] = found.x * within_ns
    return [dict(zip(buckets, row.tolist(), strict=True)) for row in ns.reshape(len(groups), len(buckets))]


def _cheapest_of_one(
    bucket: Bucket, items: float, item_ns: np.ndarray, worth: np.ndarray, free_ns: np.ndarray
) -> list[dict[Bucket, float]] | None:
    """The same for a single bucket: the cheapest group first."""
    plan: list[dict[Bucket, float]] = [{bucket: 0.0} for _ in worth]
    for index in sorted(range(len(worth)), key=lambda i: (worth[i] * item_ns[i], worth[i])):
        takes_ns = min(items * item_ns[index], free_ns[index])
        plan[index][bucket] = float(takes_ns)
        items -= takes_ns / item_ns[index]
    return plan if items <= 1e-6 else None


def _worth(group: Sequence[Place], groups: Sequence[Sequence[Place]]) -> float:
    """GPCs, and up to LARGE more of the largest slices."""
    sizes = [each[0].gpcs for each in groups]
    least, most, own = min(sizes), max(sizes), group[0].gpcs
    return own * (1 + LARGE * (own - least) / max(most - least, 1))


def _item_ns(place: Place, bucket: Bucket) -> float:
    items, ns = place.batches[bucket]
    return ns / items


def _earliest(
    left: Mapping[Bucket, float], groups: Sequence[Sequence[Place]], used_ns: Mapping[int, float], from_ns: float
) -> float:
    """Rule 4: the least time from now that is enough, FOREVER_NS if none is."""
    low, high = from_ns, 2 * from_ns
    while _cheapest(left, groups, used_ns, high) is None:
        low, high = high, 2 * high
        if high > FOREVER_NS:
            return FOREVER_NS
    while high - low > PRECISION * low:
        middle = (low + high) / 2
        low, high = (low, middle) if _cheapest(left, groups, used_ns, middle) is not None else (middle, high)
    return high


def _staffed(
    plan: Sequence[dict[Bucket, float]],
    groups: Sequence[Sequence[Place]],
    used_ns: dict[int, float],
    taken: Collection[int],
    held: Collection[int],
    within_ns: float,
) -> Holding:
    """Picks the slices of each group, and counts in `used_ns` what of the group's time is gone."""
    planned: dict[int, dict[Bucket, float]] = {}
    gpc_ns, ends_ns = 0.0, 0.0
    for of_bucket, group in zip(plan, groups, strict=True):
        total_ns = sum(of_bucket.values())
        if total_ns <= 0:
            continue
        gpc_ns += total_ns * group[0].gpcs
        picked = _picked([each for each in group if each.worker_id not in taken], total_ns / within_ns, held)
        carried = sum(place.idle for place in picked)
        ends_ns = max(ends_ns, min(total_ns / carried, within_ns) if carried else within_ns)
        for place in picked:
            planned[place.worker_id] = {bucket: ns * place.idle / carried for bucket, ns in of_bucket.items()}
        share = total_ns / _free_ns(group, used_ns, within_ns)
        for place in group:
            free_ns = _free_ns([place], used_ns, within_ns)
            used_ns[place.worker_id] = used_ns.get(place.worker_id, 0.0) + share * free_ns
    return Holding(planned, True, ends_ns, gpc_ns)


def _picked(group: Sequence[Place], needed: float, held: Collection[int]) -> list[Place]:
    """Those that carry so many slices' time: what is held first, then what has most time."""
    picked: list[Place] = []
    carried = 0.0
    for place in sorted(group, key=lambda each: (each.worker_id not in held, -round(each.idle, 1), each.worker_id)):
        if carried >= needed * (SPARE if place.worker_id in held else 1.0):
            break
        picked.append(place)
        carried += place.idle
    return picked


class IdleShares:
    """The share of its time that online work leaves of each slice, over the last ten seconds or so."""

    def __init__(self) -> None:
        self._busy: dict[int, float] = {}
        self._seen: dict[int, tuple[int, int]] = {}

    def observe(self, now_ns: int, worker_id: int, busy_ns: int) -> None:
        """`busy_ns`: of online work on it, ever."""
        before_ns, before_busy_ns = self._seen.get(worker_id, (now_ns, busy_ns))
        self._seen[worker_id] = now_ns, busy_ns
        if now_ns <= before_ns:
            return
        busy = min((busy_ns - before_busy_ns) / (now_ns - before_ns), 1.0)
        weight = 1 - math.exp((before_ns - now_ns) / TAU_NS) if worker_id in self._busy else 1.0
        self._busy[worker_id] = self._busy.get(worker_id, 0.0) * (1 - weight) + busy * weight

    def idle(self, worker_id: int) -> float:
        return 1 - self._busy.get(worker_id, 0.0)


class Elastic:
    """Keeps who holds what between one decision and the next, and hands out batches by it."""

    def __init__(self) -> None:
        self.holdings: dict[str, Holding] = {}
        self._open: dict[str, dict[int, dict[Bucket, float]]] = {}  # of the plan, what has not been handed out

    def decide(self, works: Sequence[Work], places: Mapping[str, Sequence[Place]]) -> None:
        """To be asked every second or so, and when jobs or slices come and go. Jobs that are not named hold nothing."""
        self.hold(decide(works, places, self.held_now()))

    def held_now(self) -> dict[str, Collection[int]]:
        """Workers by job, as `decide` takes them."""
        return {job: list(holding.planned) for job, holding in self.holdings.items()}

    def hold(self, holdings: dict[str, Holding]) -> None:
        """What `decide` gave."""
        self.holdings = holdings
        self._open = {
            job: {worker_id: dict(planned) for worker_id, planned in holding.planned.items()}
            for job, holding in self.holdings.items()
        }

    def held(self, job: str) -> list[int]:
        """Workers."""
        holding = self.holdings.get(job)
        return list(holding.planned) if holding is not None else []

    def pick(self, job: str, worker_id: int, there: Collection[Bucket]) -> Bucket | None:
        """Of the buckets of which there is work, the one that this slice owes most. None if it is not held."""
        open_ns = self._open.get(job, {}).get(worker_id)
        if open_ns is None or not there:
            return None
        return max(there, key=lambda bucket: open_ns.get(bucket, -math.inf))

    def started(self, job: str, worker_id: int, bucket: Bucket, ns: float) -> None:
        """A batch of a bucket that was picked, which takes so long."""
        open_ns = self._open[job][worker_id]
        open_ns[bucket] = open_ns.get(bucket, 0.0) - ns
