"""A real worker, requests of many lengths, and length buckets that move to where they are."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import numpy as np
from structlog.testing import capture_logs

from scheduler.answers import Answered
from scheduler.arena import Arena
from scheduler.core import SchedulerCore
from scheduler.driver import Driver, RefusedError, now_ns
from scheduler.fleet import Fleet
from scheduler.messages import Request
from scheduler.tensors import InputLayout
from server.lengths import LengthWatch
from server.model_files import read_model
from tests import repositories
from tests.stage import WHERE, Seen


def model(folder: Path) -> Path:
    """One whose time grows with the length, and hardly with the batch."""
    repositories.masked(folder, "{longest: 64, length: n, buckets: 3}\nlatency_table: {file: table.csv}")
    rows = [
        f"{folder.name},7g.80gb,{batch},{length / 20 + batch / 100},{length}" for length in (4, 64) for batch in (1, 8)
    ]
    (folder / "table.csv").write_text("\n".join(["model,mig_profile,batch,latency_ms,seq_len", *rows]))
    return folder


async def means(driver: Driver, arena: Arena, layout: InputLayout, key: str, lengths: list[int]) -> list[float]:
    """The model's answers to items of 1, 2, 3, ..., which all come at once."""
    ends: list[asyncio.Future[Answered | RefusedError]] = []
    for number, length in enumerate(lengths):
        slot = layout.slot(1, (length,))
        offset = arena.allocate(slot.nbytes)
        for place, array in zip(slot.places, (np.arange(1, length + 1, dtype=np.float32), [length]), strict=True):
            data = np.asarray(array, np.float32 if len(place.shape) > 1 else np.int64).tobytes()
            arena.memory[offset + place.offset :][: place.nbytes] = data
        end: asyncio.Future[Answered | RefusedError] = asyncio.get_running_loop().create_future()
        ends.append(end)
        request = Request(now_ns() + number, key, 1, length=length)
        driver.start(driver.accept(request, now_ns(), end.set_result), offset)
    found = []
    for answered in await asyncio.gather(*ends):
        assert isinstance(answered, Answered)
        (share,) = answered.shares
        found.append(share.outputs.values(0, "float32")[share.row])
    return found


def test_edges_follow_the_lengths_that_come_and_answers_stay_what_they_are(tmp_path: Path) -> None:
    source, serving, _ = read_model(model(tmp_path / "m"), 1, 1)
    assert serving.settled_lengths == source.lengths
    assert source.lengths is not None
    lengths = source.lengths

    async def story() -> None:
        arena, seen = Arena(1 << 16), Seen()
        fleet = Fleet(arena, outbox_bytes=1 << 16)
        driver = Driver(SchedulerCore(), fleet, arena, seen)
        try:
            await fleet.start(driver, [WHERE])
            layout = InputLayout((await fleet.load(source)).signature)
            assert fleet.edges(source.key) == (22, 43, 64)
            of_jobs: list[dict[str, Counter[int]]] = []
            watch = LengthWatch(
                driver, fleet, lambda: [(source.key, lengths, 2)], lambda: of_jobs.pop() if of_jobs else {}
            )
            sent = [5, 11] * 16 + [40]
            expected = [(length + 1) / 2 for length in sent]
            assert await means(driver, arena, layout, source.key, sent) == expected
            with capture_logs() as logs:
                await watch.look()
                await watch.look()
            assert fleet.edges(source.key) == (5, 11, 64)
            assert [line["edges"] for line in logs] == [(5, 11, 64)]
            assert await means(driver, arena, layout, source.key, sent) == expected
            assert sum(record.items for record in seen.records) == 2 * len(sent)
            assert len(seen.records) < len(sent)  # twice as many were sent
            # A job of another length outnumbers these requests: they do not shut it out.
            of_jobs.append({source.key: Counter({30: 1000})})
            await watch.look()
            assert 30 in fleet.edges(source.key)
        finally:
            await fleet.stop(1.0)
            arena.close()

    asyncio.run(asyncio.wait_for(story(), 60))
