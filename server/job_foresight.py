"""Where a job begins: its files opened; of one that is not there yet its length buckets, by its first items."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import msgspec

from preprocess.pipeline import PipelineError
from server.errors import ServeError
from server.job_inputs import ENCODED, LISTING, TENSORS, Item, LineReader, NothingLeft, Reader
from server.job_preparing import JobPreparer, grouped
from server.job_store import Job, Ledger, Position
from server.job_supply import Bucket
from server.job_tensors import RawTensor, TensorReader
from server.repository import Model

# Looked at: ready tensors; of what goes through a pipeline one group of the preparer's.
ITEMS = 256
# Whoever submits waits for that no longer, where the pool is busy.
PATIENCE_S = 2.0


def open_reader(folder: Path, position: Position, model: Model, inputs_dir: Path | None) -> Reader:
    """Of a job's inputs, as they are kept in its folder. Raises OSError."""
    if (folder / TENSORS).exists():
        raw = msgspec.json.decode((folder / TENSORS).read_bytes(), type=list[RawTensor])
        return TensorReader(folder, raw, position, model.signature)
    return LineReader(folder / LISTING, position, model.signature, model.serving.preprocess, inputs_dir, model.lengths)


async def opened(
    job: Job,
    folder: Path,
    model: Callable[[], Model],
    inputs_dir: Path | None,
    in_thread: Callable[..., Awaitable[Any]],
) -> tuple[Ledger, Reader]:
    """Where it goes on; what is complete needs no model for that. Raises ServeError, OSError, sqlite3.Error."""
    ledger: Ledger = await in_thread(Ledger, folder)
    try:
        job.done, job.errors = ledger.counts
        job.first_errors = await in_thread(ledger.first_errors) if job.errors else []
        if job.is_complete:
            return ledger, NothingLeft(job.asked.items)
        return ledger, await in_thread(open_reader, folder, ledger.position, model(), inputs_dir)
    except BaseException:
        ledger.close()
        raise


async def likely_left(
    open_it: Callable[[], Reader],
    items: int,
    model: Model,
    edges: Sequence[int],
    preparer: JobPreparer,
    threads: Executor,
) -> dict[Bucket, float]:
    """So many items by bucket, if all are like the first ones; all of the longest where these cannot be told."""
    if model.lengths is None or not edges:
        return {(): float(items)}
    in_thread = asyncio.get_running_loop().run_in_executor
    try:
        async with asyncio.timeout(PATIENCE_S):
            first = await in_thread(threads, _first, open_it)
            ready = await _prepared(model, first, preparer)
    except (TimeoutError, OSError, ServeError, PipelineError):
        ready = []
    found = Counter(grouped(item, model.lengths, edges) for item in ready)
    if not found:
        return {(edges[-1],) * len(model.signature.sample_dims): float(items)}
    return {bucket: items * count / found.total() for bucket, count in found.items()}


def _first(open_it: Callable[[], Reader]) -> list[Item]:
    reader = open_it()
    try:
        return [item for item in reader.read(ITEMS) if not item.error]
    finally:
        reader.close()


async def _prepared(model: Model, items: list[Item], preparer: JobPreparer) -> list[Item]:
    """Those that are tensors; of encoded ones a few are made so."""
    encoded = [item for item in items if item.bucket == ENCODED][: preparer.group]
    if encoded and model.serving.preprocess is not None:
        await preparer.prepare(model, model.serving.preprocess, encoded)
    return [item for item in items if item.bucket != ENCODED] + [item for item in encoded if not item.error]
