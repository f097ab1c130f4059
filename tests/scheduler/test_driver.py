"""The driver by itself: every request is told its end, whatever the others do, and every slot comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from scheduler.answers import Answered
from scheduler.driver import Pending, RefusedError
from scheduler.messages import Reason
from tests.stage import KEY, Stage

End = Answered | RefusedError


def on_stage(story: Callable[[Stage], Awaitable[None]]) -> None:
    async def run() -> None:
        await story(Stage())

    asyncio.run(run())


def submit(stage: Stage, on_end: Callable[[End], None], expires_ns: int | None = None) -> Pending:
    pending = stage.driver.accept(stage.request(expires_ns), time.monotonic_ns(), on_end)
    stage.driver.start(pending, stage.arena.allocate(4))
    return pending


def test_one_callback_that_raises_costs_no_other_its_answer() -> None:
    async def story(stage: Stage) -> None:
        ends: list[End] = []

        def broken(end: End) -> None:
            raise ValueError("no")

        submit(stage, ends.append)  # runs alone; those that wait for it make one batch
        for on_end in (ends.append, broken, ends.append, ends.append):
            submit(stage, on_end)
        stage.finish(0)
        stage.finish(1)
        assert [type(end) for end in ends] == [Answered] * 4
        assert (stage.driver.unfinished(), stage.arena.used) == (0, 0)

    on_stage(story)


def test_giving_up_ends_everything_also_what_expires_meanwhile() -> None:
    async def story(stage: Stage) -> None:
        ends: list[End] = []

        expires_ns = time.monotonic_ns() + 10_000_000

        def slow(end: End) -> None:
            ends.append(end)
            while time.monotonic_ns() <= expires_ns:
                pass  # it takes longer than the third one may wait

        submit(stage, ends.append)
        submit(stage, slow)
        submit(stage, ends.append, expires_ns=expires_ns)
        submit(stage, ends.append)
        stage.driver.give_up("good bye")
        submit(stage, ends.append)
        reasons = [end.reason for end in ends if isinstance(end, RefusedError)]
        assert sorted(reasons) == sorted([Reason.UNAVAILABLE] * 4 + [Reason.EXPIRED])
        assert stage.driver.unfinished() == 0

    on_stage(story)


def test_an_accepted_request_is_unfinished_before_its_inputs_are_there() -> None:
    async def story(stage: Stage) -> None:
        ends: list[End] = []
        pending = stage.driver.accept(stage.request(), time.monotonic_ns(), ends.append)
        idle = asyncio.create_task(stage.driver.idle(KEY))
        await asyncio.sleep(0)
        assert (stage.driver.unfinished(KEY), idle.done(), stage.sent) == (1, False, [])
        stage.driver.start(pending, stage.arena.allocate(4))
        stage.finish(0)
        await asyncio.wait_for(idle, 5)
        assert [type(end) for end in ends] == [Answered]

    on_stage(story)


@pytest.mark.parametrize("how", ["cancel", "withdraw", "give up"])
def test_what_ends_before_its_inputs_are_there_gives_its_slot_back_once_they_are(how: str) -> None:
    async def story(stage: Stage) -> None:
        ends: list[End] = []
        pending = stage.driver.accept(stage.request(), time.monotonic_ns(), ends.append)
        offset = stage.arena.allocate(4)
        match how:
            case "cancel":
                stage.driver.cancel(pending)
                assert stage.seen.left == [True]
            case "withdraw":
                assert stage.driver.withdraw(pending)
                assert not stage.driver.withdraw(pending)
            case _:
                stage.driver.give_up("good bye")
        assert (stage.driver.unfinished(), len(ends)) == (0, how == "give up")
        assert stage.arena.used > 0, "somebody may be writing to it"
        stage.driver.start(pending, offset)
        assert (stage.arena.used, stage.sent, len(ends)) == (0, [], how == "give up")

    on_stage(story)


def test_a_slot_that_a_worker_reads_is_freed_after_its_batch() -> None:
    async def story(stage: Stage) -> None:
        ends: list[End] = []
        pending = submit(stage, ends.append)
        stage.driver.cancel(pending)
        stage.driver.cancel(pending)  # a second time: nothing
        assert (stage.driver.unfinished(), stage.seen.left) == (0, [False])
        assert stage.arena.used > 0
        stage.finish(0)
        assert (stage.arena.used, ends) == (0, [])

    on_stage(story)
