"""What is told of a job while it runs: its rate, its slices, when it ends."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from scheduler.driver import now_ns
from scheduler.elastic import FOREVER_NS, Holding
from server.job_pace import Casualties, Pace
from server.job_store import Job, JobState

INTERNAL_ERROR = "an internal error; the server's log has the details"


def now_s() -> float:
    return now_ns() / 1e9


def within_ns(job: Job) -> float:
    """By the wall clock as it is now: one that is set right sets this right. Infinite without a deadline."""
    deadline_s = job.asked.deadline_s
    return float("inf") if deadline_s is None else (deadline_s - time.time()) * 1e9


def late_s(job: Job, at_s: float) -> float | None:
    """How long after its deadline it ended, or that has passed at that time of the wall clock; None where neither."""
    if job.asked.deadline_s is None:
        return None
    ends_s = at_s if job.ended_s is None else job.ended_s
    return round(max(ends_s - job.asked.deadline_s, 0.0), 1) or None


def progress(
    job: Job, pace: Pace, holding: Holding | None, held: Mapping[int, str], casualties: Casualties
) -> dict[str, Any]:
    """`held`: the names of its slices, by worker."""
    at_s = now_s()
    found: dict[str, Any] = {"rate_per_s": round(pace.per_s(at_s), 1), "slices": list(held.values())}
    if holding is not None and 0 < holding.ends_ns < FOREVER_NS:
        planned_s = holding.ends_ns / 1e9
        found["behind"] = not holding.planned
        ends_s = pace.ends_s(job.asked.items - job.done, planned_s, at_s)
        found["ends_in_s"] = round(ends_s, 1)
        found["in_time"] = holding.feasible and (ends_s <= planned_s or ends_s * 1e9 <= within_ns(job))
    spared = {name: casualties.spared_s(worker_id, at_s) for worker_id, name in held.items()}
    found["left_alone"] = {name: round(seconds, 1) for name, seconds in spared.items() if seconds}
    return found


def demands(jobs: Iterable[Job]) -> list[tuple[str, float, float]]:
    """Of each model with jobs that have a deadline: items that are left, and seconds to the first deadline."""
    found: dict[str, tuple[float, float]] = {}
    for job in jobs:
        if job.state == JobState.RUNNING and job.asked.deadline_s is not None:
            items, within_s = found.get(job.asked.model, (0.0, float("inf")))
            found[job.asked.model] = items + job.asked.items - job.done, min(within_s, within_ns(job) / 1e9)
    return [(model, items, within_s) for model, (items, within_s) in found.items() if items]


def too_many(job: Job) -> str:
    """Why it is stopped."""
    shown = "; ".join(map(str, job.first_errors[:3]))
    return f"{job.errors} items have errors, more than max_errors={job.asked.max_errors}; {shown}"


def not_resumed(job: Job, max_errors: int) -> str:
    """Why it cannot go on with that limit, and what to do; nothing where it can."""
    if job.state not in (JobState.CANCELLED, JobState.STOPPED):
        return f"job {job.id} is {job.state}; only what was stopped can be resumed"
    if job.errors > max_errors:
        more = f"{job.errors} items have errors, more than max_errors={max_errors}"
        return f"job {job.id} would be stopped again at once: {more}; {_with_more_errors(job)}"
    return ""


def no_results(job: Job) -> str:
    """Of a job that is not done: why, and what to do."""
    far = f"job {job.id} is {job.state}, {job.done} of {job.asked.items} items done"
    if job.state == JobState.STOPPED and job.errors > job.asked.max_errors:
        return f"{far}, {job.errors} of them with errors; {_with_more_errors(job)}"
    if job.state in (JobState.CANCELLED, JobState.STOPPED):
        return f"{far}; migserve jobs resume {job.id} goes on to its results"
    return f"{far}; there are results once all are"


def _with_more_errors(job: Job) -> str:
    return f"migserve jobs resume {job.id} --max-errors N goes on, with an N of {job.errors} or more"
