"""Latency by length, and what batches of different lengths are padded to."""

from __future__ import annotations

import pytest

from scheduler.core import SchedulerCore
from scheduler.lengths import Lengths, batch_ms, first_edges, item_costs, latency_ns, stepped, table, to_measure
from scheduler.messages import Answer, AnyCommand, AnyEvent, Arrived, BatchDone, Request, Run, Serves, Tick, WorkerUp
from scheduler.policies.named import POLICIES

# At batches of 1 and 4; one item of the shorter length was measured too slow.
BY_LENGTH = ((100, ((1, 4.5), (4, 5.0))), (200, ((1, 3.0), (4, 9.0))))


@pytest.mark.parametrize(
    ("lengths", "shortest", "measured"),
    [
        (Lengths(3000), 2, (93, 187, 375, 750, 1500, 3000)),
        (Lengths(3000, (500, 3000)), 2, (500, 3000)),
        (Lengths(40), 16, (16, 20, 40)),
        (Lengths(1), 2, (1,)),
    ],
)
def test_halves_are_measured_or_the_edges_that_are_given(
    lengths: Lengths, shortest: int, measured: tuple[int, ...]
) -> None:
    assert to_measure(lengths, shortest) == measured


def test_between_lengths_latency_is_linear_and_shorter_is_never_slower() -> None:
    known = table(BY_LENGTH, 4)
    assert known.rows == (pytest.approx((3.0, 4.5 + 1 / 6, 4.5 + 2 / 6, 5.0)), pytest.approx((3.0, 5.0, 7.0, 9.0)))
    assert batch_ms(known, 150) == pytest.approx([3.0, (9.5 + 1 / 6) / 2, (11.5 + 2 / 6) / 2, 7.0])
    assert batch_ms(known, 10) == known.rows[0]
    assert batch_ms(known, 400)[3] == 18.0
    assert latency_ns(BY_LENGTH, (100, 200), 4)[3::4] == (5_000_000, 9_000_000)


def test_first_edges_part_all_lengths_evenly_where_time_grows_with_them() -> None:
    by_length = tuple((length, ((1, float(length)), (2, 2.0 * length))) for length in (10, 1280))
    edges = first_edges(Lengths(1280, count=4), 2, item_costs([by_length], 2))
    assert edges == (320, 640, 960, 1280)
    assert first_edges(Lengths(1280, (100, 1280)), 2, item_costs([by_length], 2)) == (100, 1280)


def test_where_length_costs_nothing_one_bucket_would_do() -> None:
    """As with a latency table that was measured at one length only."""
    edges = first_edges(Lengths(64, count=3), 1, item_costs([((64, ((1, 5.0),)),)], 8))
    assert edges[-1] == 64


def test_lengths_are_rounded_up_to_a_part_of_the_longest() -> None:
    assert [stepped(length, 3000) for length in (1, 24, 25, 2999, 3000)] == [24, 24, 48, 3000, 3000]
    assert [stepped(length, 100) for length in (1, 2)] == [1, 2]


def runs(commands: list[AnyCommand]) -> list[tuple[int, list[int]]]:
    """Of each batch what it is padded to, and its requests."""
    return [(each.length, [piece.request_id for piece in each.pieces]) for each in commands if isinstance(each, Run)]


def test_requests_of_a_bucket_share_batches_padded_to_its_edge_and_others_do_not() -> None:
    core = SchedulerCore()
    core.handle(0, WorkerUp(0, 7, 1))
    core.handle(0, Serves(0, "m", (1000, 1100, 1200, 1300) * 2, (100, 200)))
    assert runs(core.handle(0, Arrived(Request(1, "m", 1, length=40)))) == [(100, [1])]
    for number, length in ((2, 150), (3, 60), (4, 100), (5, 200)):
        assert runs(core.handle(1, Arrived(Request(number, "m", 1, length=length)))) == []
    batches = runs(core.handle(1000, BatchDone(0, 1))) + runs(core.handle(3000, BatchDone(0, 2)))
    assert sorted(batches) == [(100, [3, 4]), (200, [2, 5])]


def test_edges_may_change_while_requests_wait() -> None:
    core = SchedulerCore()
    core.handle(0, WorkerUp(0, 7, 1))
    core.handle(0, Serves(0, "m", (1000, 1100), (200,)))
    core.handle(0, Arrived(Request(1, "m", 1, length=200)))
    core.handle(1, Arrived(Request(2, "m", 1, length=30)))
    core.handle(1, Arrived(Request(3, "m", 1, length=130)))
    assert runs(core.handle(2, Serves(0, "m", (500, 600, 1000, 1100), (50, 200)))) == []
    batches = runs(core.handle(1000, BatchDone(0, 1))) + runs(core.handle(3000, BatchDone(0, 2)))
    assert sorted(batches) == [(50, [2]), (200, [3])]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("before", "after"), [((100, 200), (200,)), ((200,), (20, 90, 200)), ((50, 200), (150, 200))])
def test_every_request_ends_once_while_edges_change_on_one_worker_after_the_other(
    policy: str, before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    core, now_ns, running, ended = SchedulerCore(policy=POLICIES[policy]), 0, {}, []

    def tell(event: AnyEvent) -> None:
        for command in core.handle(now_ns, event):
            if isinstance(command, Run):
                longest = max(piece.request_id for piece in command.pieces)  # their number is their length
                assert command.length >= longest
                running[command.batch_id] = command.worker_id
            elif isinstance(command, Answer):
                ended.extend(command.request_ids)

    for worker_id in (0, 1):
        tell(WorkerUp(worker_id, 1, 1))
        tell(Serves(worker_id, "m", (1000, 1500, 2000, 2500) * len(before), before))
    for length in range(1, 201, 3):
        tell(Arrived(Request(length, "m", 1, length=length)))
        if length in (61, 121):
            edges = after if length == 61 else before
            for worker_id in (0, 1):
                tell(Serves(worker_id, "m", (1000, 1500, 2000, 2500) * len(edges), edges))
    while running:
        now_ns += 2500
        batch_id, worker_id = next(iter(running.items()))
        del running[batch_id]
        tell(BatchDone(worker_id, batch_id))
        if not running:
            now_ns += 1_000_000_000
            tell(Tick())
    assert sorted(ended) == list(range(1, 201, 3))
