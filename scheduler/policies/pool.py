"""One pool, late binding, a late lane: nothing is bound to a slice before that slice is free. Pure.

(draft)
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator

from scheduler.batching import Line
from scheduler.domain import Company, Kind, Part, Pool, Worker, models_of
from scheduler.policies import Start

THETA = 0.55
BATCH_SHARE = 0.8
BLOCKING_SHARE = 0.65
LATE_FIRST = 7.0
PATIENCE_NS = 1_000_000_000
OPEN_SHARE = 0.05
IDLE_STREAMS = 64

StreamKey = tuple[int, Kind, Company]


class _Rates:
    """How fast the slices serve one kind within an SLO. `shares`: of each slice in `per_ns`, the items a ns of all."""

    __slots__ = ("caps", "changes", "least_ns", "per_ns", "rates", "shares")

    def __init__(self, workers: list[Worker], kind: Kind, slo_ns: float, changes: int) -> None:
        self.changes = changes
        self.caps: dict[int, int] = {}
        self.rates: dict[int, float] = {}
        for worker in workers:
            table = worker.tables[kind]
            cap = self.caps[worker.id] = max(table.largest_within(slo_ns), 1)
            self.rates[worker.id] = table.best_per_ns[cap]
        self.per_ns = sum(self.rates.values())
        self.shares = [(worker, self.rates[worker.id] / self.per_ns) for worker in workers]
        self.least_ns = min(worker.tables[kind].time_ns(1) for worker in workers)

    def capacity_ns(self, now_ns: int, due_ns: int) -> float:
        """Pool time until then: of every slice the time that it is free, by its share."""
        total = 0.0
        for worker, share in self.shares:
            free_ns = worker.free_at_ns
            left_ns = due_ns - (free_ns if free_ns > now_ns else now_ns)
            if left_ns > 0:
                total += share * left_ns
        return total


class _Stream:
    """What waits of one kind, company and class: timely by due time, late by due time, open by arrival."""

    __slots__ = ("company", "key", "kind", "late", "open", "priority", "rates", "sizes", "slo_ns", "timely")

    def __init__(self, key: StreamKey) -> None:
        self.key = key
        self.priority, self.kind, self.company = key
        self.timely = Line()
        self.late = Line()
        self.open = Line()
        self.sizes: list[tuple[int, int, int, Part]] = []  # heap of the timely ones, the largest first
        self.slo_ns = 0
        self.rates: _Rates

    def is_empty(self) -> bool:
        return not (self.timely.entries or self.late.entries or self.open.entries)

    def push_timely(self, part: Part) -> None:
        assert part.due_ns is not None
        self.timely.push(part, part.due_ns)
        if len(self.sizes) > 2 * len(self.timely.entries) + 64:
            self.sizes = [_by_size(entry[3]) for entry in self.timely.entries]
            heapq.heapify(self.sizes)
        else:
            heapq.heappush(self.sizes, _by_size(part))

    def largest(self) -> Part | None:
        """The timely part with the most items."""
        sizes = self.sizes
        while sizes:
            size, _, _, part = sizes[0]
            if part.queued and not part.late:
                if part.items == -size:
                    return part
                heapq.heapreplace(sizes, _by_size(part))  # it was cut
            else:
                heapq.heappop(sizes)
        return None

    def demote(self, part: Part) -> None:
        """To the late lane."""
        assert part.due_ns is not None
        self.timely.remove(part, part.due_ns)
        part.late = True
        self.late.push(part, part.due_ns)

    def discard(self, part: Part) -> None:
        if part.due_ns is None:
            self.open.remove(part, 0)
        elif part.late:
            self.late.remove(part, part.due_ns)
        else:
            self.timely.remove(part, part.due_ns)

    def demand_ns(self, due_ns: int) -> float:
        """Pool time of what is due by then; those in between are taken to be of average size."""
        entries = self.timely.entries
        if not entries:
            return 0.0
        items: float = self.timely.items
        if entries[-1][0] > due_ns:
            items *= bisect.bisect_right(entries, (due_ns + 1,)) / len(entries)
        return items / self.rates.per_ns


def _by_size(part: Part) -> tuple[int, int, int, Part]:
    return (-part.items, part.query.request.id, part.first, part)


class LateLanePool:
    """The streams, and when each slice may next put open work first."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._streams: dict[StreamKey, _Stream] = {}
        self._busy: dict[StreamKey, _Stream] = {}  # those where something waits
        self._rates: dict[tuple[Kind, int], _Rates] = {}
        self._open_first_ns: dict[int, int] = {}
        self._theta = THETA

    # ---- arrivals ----

    def offer(self, now_ns: int, part: Part, bound_ns: int | None) -> int:
        stream = self._stream(part)
        if part.due_ns is None:
            self._rate(stream)
            stream.open.push(part, 0)
            self._busy[stream.key] = stream
            return 0
        stream.slo_ns = max(part.due_ns - part.query.arrived_ns, 1)
        self._rate(stream)
        self._busy[stream.key] = stream
        part.late = False
        stream.push_timely(part)
        self._shed(now_ns, stream, part.due_ns)
        return 0

    def _shed(self, now_ns: int, stream: _Stream, due_ns: int) -> None:
        """Puts the largest back until what is due by then fits into the capacity until then."""
        rates = stream.rates
        room_ns = self._theta * rates.capacity_ns(now_ns, due_ns)
        demand_ns = sum(each.demand_ns(due_ns) for each in self._busy.values() if each.priority <= stream.priority)
        while demand_ns > room_ns:
            victim = stream.largest()
            if victim is None:
                return
            demand_ns -= victim.items / rates.per_ns
            stream.demote(victim)

    # ---- batches ----

    def next(self, now_ns: int) -> Start | None:
        busy = self._busy
        if not busy:
            return None
        start = None
        for priority in sorted({stream.priority for stream in busy.values()}):
            streams = [stream for stream in busy.values() if stream.priority == priority]
            start = self._next_of(now_ns, streams)
            if start is not None:
                break
        for key in [key for key, stream in busy.items() if stream.is_empty()]:
            del busy[key]
            if len(self._streams) > IDLE_STREAMS:
                del self._streams[key]
        return start

    def _next_of(self, now_ns: int, streams: list[_Stream]) -> Start | None:
        for stream in streams:
            self._rate(stream)
            self._give_up_heads(now_ns, stream)
        overdue = [s for s in streams if s.late.entries and now_ns - s.late.entries[0][0] > (LATE_FIRST - 1) * s.slo_ns]
        for stream in overdue:
            start = self._late_batch(now_ns, stream)
            if start is not None:
                return start
        timely = [stream for stream in streams if stream.timely.entries]
        if len(timely) > 1:
            timely.sort(key=lambda s: (s.timely.entries[0][0] - now_ns) / s.slo_ns)
        for stream in timely:
            start = self._timely_batch(now_ns, stream)
            if start is not None:
                return start
        for stream in sorted((s for s in streams if s.late.entries), key=lambda s: s.late.entries[0][0]):
            start = self._late_batch(now_ns, stream)
            if start is not None:
                return start
        for stream in sorted((s for s in streams if s.open.entries), key=lambda s: s.open.entries[0][1]):
            start = self._open_batch(now_ns, stream)
            if start is not None:
                return start
        return None

    def _give_up_heads(self, now_ns: int, stream: _Stream) -> None:
        """What no slice can serve in time any more is late."""
        entries = stream.timely.entries
        latest_ns = now_ns + stream.rates.least_ns
        while entries and entries[0][0] < latest_ns:
            stream.demote(entries[0][3])

    def _timely_batch(self, now_ns: int, stream: _Stream) -> Start | None:
        kind, line, rates = stream.kind, stream.timely, stream.rates
        best: tuple[float, Worker, int, int, int] | None = None
        for worker in self._ready(kind):
            table = worker.tables[kind]
            start_ns = max(now_ns, worker.free_at_ns)
            guard = table.guard
            index = 0
            head = line.entries[0]
            if head[0] < start_ns + guard * table.ns[1]:
                index = bisect.bisect_left(line.entries, (int(start_ns + guard * table.ns[1]),))
                if index == len(line.entries):
                    continue
                head = line.entries[index]
            left_ns = min(head[0] - start_ns, self._blocking_ns(worker, kind)) / guard
            n = min(line.items, table.largest_within(left_ns), rates.caps[worker.id])
            need = 1 if head[3].may_be_cut else head[3].items
            if n < need:
                continue
            b = table.best[n]
            if b < need:
                b = need
            value = b / table.ns[b] / rates.rates[worker.id]
            if best is None or value > best[0]:
                best = value, worker, index, b, head[0]
        if best is None:
            return None
        _, worker, index, b, due_ns = best
        parts = line.take(b, index)
        if not line.entries:
            self._fill_up(now_ns, worker, stream, parts, due_ns)
        return Start(worker, kind, parts)

    def _fill_up(self, now_ns: int, worker: Worker, stream: _Stream, parts: list[Part], due_ns: int) -> None:
        """Late and open items ride along in a batch that took all that was timely."""
        table = worker.tables[stream.kind]
        items = sum(part.items for part in parts)
        start_ns = max(now_ns, worker.free_at_ns)
        left_ns = min(due_ns - start_ns, self._blocking_ns(worker, stream.kind)) / table.guard
        for line in (stream.late, stream.open):
            if not line.entries:
                continue
            n = table.best[min(items + line.items, table.largest_within(left_ns), stream.rates.caps[worker.id])]
            head = line.entries[0][3]
            if n > items and (head.may_be_cut or head.items <= n - items):
                more = line.take(n - items)
                items += sum(part.items for part in more)
                parts += more

    def _late_batch(self, now_ns: int, stream: _Stream) -> Start | None:
        return self._bulk(now_ns, stream, stream.late)

    def _open_batch(self, now_ns: int, stream: _Stream) -> Start | None:
        return self._bulk(now_ns, stream, stream.open)

    def _bulk(self, now_ns: int, stream: _Stream, line: Line) -> Start | None:
        kind, rates = stream.kind, stream.rates
        worker = max(self._ready(kind), key=lambda w: rates.rates[w.id], default=None)
        if worker is None:
            return None
        table = worker.tables[kind]
        n = min(line.items, rates.caps[worker.id], max(table.largest_within(self._blocking_ns(worker, kind)), 1))
        return Start(worker, kind, line.take(table.best[n]))

    def _ready(self, kind: Kind) -> Iterator[Worker]:
        return (worker for worker in self._pool.ready.values() if kind in worker.tables)

    def _blocking_ns(self, worker: Worker, kind: Kind) -> float:
        """How long a batch may keep the slice from other models that have been waiting."""
        slos = [s.slo_ns for s in self._streams.values() if s.kind[0] != kind[0] and s.kind in worker.tables]
        return min((BLOCKING_SHARE * slo for slo in slos if slo), default=float("inf"))

    def wake_ns(self, now_ns: int) -> int | None:
        return None

    # ---- leaving ----

    def discard(self, part: Part) -> None:
        self._streams[_key(part)].discard(part)

    def evict(self, worker: Worker, model: str | None = None) -> list[Part]:
        models = models_of(worker) if model is None else [model]
        parts: list[Part] = []
        for key in [key for key in self._busy if key[1][0] in models and self._pool.serving.get(key[1]) == [worker]]:
            stream = self._busy.pop(key)
            del self._streams[key]
            parts += stream.timely.drain() + stream.late.drain() + stream.open.drain()
        return parts

    # ---- estimates ----

    def backlog_ns(self, now_ns: int, model: str) -> int:
        streams = [stream for stream in self._busy.values() if stream.kind[0] == model]
        workers = [w for (name, _), serving in self._pool.serving.items() if name == model for w in serving]
        free_ns = min((worker.free_at_ns for worker in workers), default=now_ns)
        items_ns = sum((s.timely.items + s.late.items + s.open.items) / s.rates.per_ns for s in streams)
        return max(free_ns - now_ns, 0) + int(items_ns)

    def _stream(self, part: Part) -> _Stream:
        key = _key(part)
        stream = self._streams.get(key)
        if stream is None:
            stream = self._streams[key] = _Stream(key)
        return stream

    def _rate(self, stream: _Stream) -> None:
        """Brings the stream's rates up to date."""
        slo_ns = stream.slo_ns or 1 << 62
        steps = max(slo_ns.bit_length() - 4, 0)
        key = (stream.kind, slo_ns >> steps << steps)
        rates = self._rates.get(key)
        if rates is None or rates.changes != self._pool.changes:
            workers = self._pool.serving[stream.kind]
            rates = self._rates[key] = _Rates(workers, stream.kind, BATCH_SHARE * slo_ns, self._pool.changes)
        stream.rates = rates


def _key(part: Part) -> StreamKey:
    return part.query.request.priority, part.kind, part.company
