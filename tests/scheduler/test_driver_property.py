"""The driver under random stories of requests that are cut: each ends once, in order, and no slot goes too early.

The core is the real one, with a policy that cuts wherever it may. The workers read the arena when they are done,
which is as late as can be, and a slot that is given back is overwritten at once.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from scheduler import driver as driver_module
from scheduler.answers import Answered
from scheduler.arena import Arena
from scheduler.channel import Done, Failed, RunBatch
from scheduler.core import SchedulerCore
from scheduler.driver import Driver, Pending, RefusedError, _Running, now_ns
from scheduler.messages import Request
from scheduler.tensors import InputLayout, Signature, TensorSpec
from tests.cutter import Cutter
from tests.stage import KEY, WHERE, Seen

LAYOUT = InputLayout(Signature((TensorSpec("a", "FP32", (1,)), TensorSpec("b", "INT32", (2,))), (), 64))
TABLE_NS = tuple(range(1000, 1064))
End = Answered | RefusedError


class ScribblingArena(Arena):
    """What is given back is overwritten."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.taken: dict[int, int] = {}  # offset -> bytes

    def allocate(self, nbytes: int) -> int:
        offset = super().allocate(nbytes)
        self.taken[offset] = nbytes
        return offset

    def free(self, offset: int) -> None:
        nbytes = self.taken.pop(offset)
        self.memory[offset : offset + nbytes] = b"\xff" * nbytes
        super().free(offset)


def inputs(number: int, items: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Of a request: no two items of any two are alike."""
    a = 100 * number + np.arange(items, dtype=np.float32).reshape(-1, 1)
    return a, np.concatenate([a, -a], axis=1).astype(np.int32)


@dataclass
class Theatre:
    """A driver, workers that do as the story says, clients, and a check of what each is told."""

    seed: int
    ends: dict[int, list[End]] = field(default_factory=dict)
    pending: dict[int, Pending] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    up: set[int] = field(default_factory=set)
    going: set[int] = field(default_factory=set)
    running: dict[int, dict[int, tuple[RunBatch, bytes]]] = field(default_factory=dict)  # with what it read at first
    items_done: int = 0

    def __post_init__(self) -> None:
        self.arena = ScribblingArena()
        self.seen = Seen()
        fleet: Any = self  # it sends, and that is all the driver asks of a fleet
        chance = random.Random(self.seed)
        core = SchedulerCore(policy=lambda pool: Cutter(pool, lambda: chance.randint(1, 7)))
        self.driver = Driver(core, fleet, self.arena, self.seen)

    # ---- the fleet ----

    def send(self, worker_id: int, batch: RunBatch) -> None:
        assert worker_id in self.up - self.going
        self.running[worker_id][batch.batch_id] = batch, self.read(batch).tobytes()

    def read(self, batch: RunBatch) -> np.ndarray[Any, Any]:
        """The rows of a batch, as the arena has them now: of each item a, b[0], b[1]."""
        rows = []
        for index, (offset, items) in enumerate(zip(batch.offsets, batch.items, strict=True)):
            first, total = batch.cut.get(index, (0, items))
            columns = [
                np.frombuffer(self.arena.memory[offset + place.offset :][: place.nbytes], dtype).reshape(place.shape)
                for place, dtype in zip(LAYOUT.piece(total, (), first, items), (np.float32, np.int32), strict=True)
            ]
            rows.append(np.concatenate(columns, axis=1, dtype=np.float64))
        return np.concatenate(rows)

    # ---- steps ----

    def arrive(self, items: int, whole: bool, alone: bool, follows: bool) -> None:
        """`follows`: its client sends another one from within the answer."""
        number = len(self.pending)
        self.ends[number] = []

        def on_end(end: End) -> None:
            self.ends[number].append(end)
            if follows:
                self.arrive(items, whole, alone, False)

        request = Request(number, KEY, items, alone=alone, whole=whole)
        self.pending[number] = self.driver.accept(request, now_ns(), on_end)
        slot = LAYOUT.slot(items, ())
        offset = self.arena.allocate(slot.nbytes)
        for place, array in zip(slot.places, inputs(number, items), strict=True):
            begin = offset + place.offset
            self.arena.memory[begin : begin + place.nbytes] = array.tobytes()
        self.driver.start(self.pending[number], offset)

    def cancel(self, which: int) -> None:
        if self.pending:
            number = which % len(self.pending)
            if not self.pending[number].ended:
                self.cancelled.add(number)
            self.driver.cancel(self.pending[number])

    def bring_up(self, worker: int) -> None:
        if worker not in self.up:
            self.up.add(worker)
            self.going.discard(worker)
            self.running[worker] = {}
            self.driver.worker_up(worker, WHERE, 2)
            self.driver.serves(worker, KEY, TABLE_NS, 1.0)

    def end_batch(self, which: int, fails: bool) -> None:
        batches = [(worker, id) for worker, running in self.running.items() for id in running]
        if not batches:
            return
        worker, batch_id = batches[which % len(batches)]
        batch, first_read = self.running[worker].pop(batch_id)
        rows = self.read(batch)
        assert rows.tobytes() == first_read, "a slot was given back, or overwritten, while a worker read it"
        if fails:
            self.driver.batch_failed(worker, Failed(batch_id, KEY, "raised", ""))
        else:
            self.items_done += len(rows)
            outbox = memoryview(rows.tobytes())
            self.driver.batch_done(worker, Done(batch_id, [0], [len(outbox)], [rows.shape], 1, 1, 1), outbox)

    def lose_worker(self, which: int, comes_back: bool) -> None:
        if self.up:
            worker = sorted(self.up)[which % len(self.up)]
            self.up.discard(worker)
            batch_ids = list(self.running.pop(worker))
            self.driver.worker_lost(worker, "killed", comes_back=comes_back, batch_ids=batch_ids)

    def drain(self, which: int) -> None:
        if self.up - self.going:
            worker = sorted(self.up - self.going)[which % len(self.up - self.going)]
            self.going.add(worker)
            self.driver.drains(worker)

    def give_up(self) -> None:
        self.driver.give_up("good bye")

    # ---- what must be ----

    def check(self) -> None:
        read = {
            offset for running in self.running.values() for batch, _ in running.values() for offset in batch.offsets
        }
        open_ = {pending.offset for pending in self.pending.values() if not pending.ended}
        assert set(self.arena.taken) == read | open_, "a slot is leaked, or went too early"
        for number, ends in self.ends.items():
            ended = self.pending[number].ended
            assert len(ends) == (ended and number not in self.cancelled), "told twice, or not at all"

    def check_answers(self) -> int:
        """How many there are; their outputs are their inputs, in order."""
        answers = [(number, end) for number, (end, *_) in self.told() if isinstance(end, Answered)]
        for number, end in answers:
            parts = []
            for share in end.shares:
                rows = np.frombuffer(share.outputs.data[0]).reshape(share.outputs.shapes[0])
                parts.append(rows[share.row : share.row + share.items])
            expected = np.concatenate(inputs(number, self.pending[number].request.items), axis=1)
            assert np.array_equal(np.concatenate(parts), expected), "joined in another order, or of others' items"
        return len(answers)

    def told(self) -> list[tuple[int, list[End]]]:
        return [(number, ends) for number, ends in self.ends.items() if ends]

    async def finish(self) -> None:
        """With one worker that lives, everything ends."""
        self.bring_up(99)
        for _ in range(10_000):
            if not any(self.running.values()):
                break
            self.end_batch(0, fails=False)
        self.check()
        assert (self.driver.unfinished(), self.arena.used) == (0, 0)
        answers = self.check_answers()
        await asyncio.sleep(0)  # records are made after the answers
        assert sum(len(record.request_ns) for record in self.seen.records) == answers, "each counted once"
        assert sum(record.items for record in self.seen.records) == self.items_done
        for record in self.seen.records:
            assert all(0 <= q <= r for q, r in zip(record.queue_ns, record.request_ns, strict=True))


MOSTLY_NOT = st.sampled_from([False, False, False, True])
ARRIVE = st.tuples(st.just("arrive"), st.integers(1, 20), MOSTLY_NOT, MOSTLY_NOT, MOSTLY_NOT)
END_BATCH = st.tuples(st.just("end_batch"), st.integers(0, 100), MOSTLY_NOT)
BRING_UP = st.tuples(st.just("bring_up"), st.integers(0, 3))
STEPS = st.one_of(
    ARRIVE,
    ARRIVE,
    END_BATCH,
    END_BATCH,
    END_BATCH,
    BRING_UP,
    BRING_UP,
    st.tuples(st.just("cancel"), st.integers(0, 100)),
    st.tuples(st.just("lose_worker"), st.integers(0, 100), st.sampled_from([True, True, False])),
    st.tuples(st.just("drain"), st.integers(0, 100)),
)
STORIES = (st.lists(STEPS, min_size=10, max_size=80), st.integers(0, 1000), MOSTLY_NOT)


def check_story(steps: list[tuple[Any, ...]], seed: int, gives_up: bool) -> None:
    async def story() -> None:
        theatre = Theatre(seed)
        for worker in range(3):
            theatre.bring_up(worker)
        for name, *arguments in steps:
            getattr(theatre, name)(*arguments)
            theatre.check()
        if gives_up:
            theatre.give_up()
            theatre.check()
        await theatre.finish()

    asyncio.run(story())


@settings(max_examples=150, deadline=None)
@given(*STORIES)
def test_every_request_ends_once_joined_in_order_and_no_slot_goes_early(
    steps: list[tuple[Any, ...]], seed: int, gives_up: bool
) -> None:
    check_story(steps, seed, gives_up)


def free_at_the_first(self: Driver, running: _Running) -> None:
    for pending in running.requests:
        if pending.ended and pending.running:
            self._arena.free(pending.offset)
            pending.running = 0
        pending.running = max(pending.running - 1, 0)


def never_free(self: Driver, running: _Running) -> None:
    for pending in running.requests:
        pending.running -= 1


def end_frees_at_once(self: Driver, pending: Pending, real: Callable[..., None] = Driver._end) -> None:
    pending.running = 0
    real(self, pending)


def by_row(_: str) -> Callable[[Any], Any]:
    return attrgetter("row")


@pytest.mark.parametrize(
    ("where", "name", "mutation"),
    [
        (Driver, "_put_back", free_at_the_first),
        (Driver, "_put_back", never_free),
        (Driver, "_end", end_frees_at_once),
        (driver_module, "attrgetter", by_row),
    ],
)
def test_the_property_notices_a_broken_driver(
    where: Any, name: str, mutation: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, mutation)
    quick = settings(
        max_examples=300, deadline=None, database=None, phases=[Phase.generate], report_multiple_bugs=False
    )
    with pytest.raises((AssertionError, KeyError)):
        quick(given(*STORIES)(check_story))()
