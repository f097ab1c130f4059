"""The HTTP routes of batch jobs. Ordinary FastAPI."""

from __future__ import annotations

import asyncio
import datetime
import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, JSONResponse
from starlette.requests import ClientDisconnect

from server.app import refuse_web_pages
from server.errors import invalid
from server.job_intake import Intake, read_terms
from server.job_progress import late_s
from server.job_store import ItemError, Job
from server.jobs import Jobs

_TYPES = {".jsonl": "application/x-ndjson"}
# For the event loop to find out that a connection is closed.
CLOSED_S = 0.01


def router(jobs: Jobs, intake: Intake) -> APIRouter:
    """All routes under /v2/jobs."""
    routes = APIRouter(dependencies=[Depends(refuse_web_pages)])

    @routes.post("/v2/jobs")
    async def submit(request: Request) -> JSONResponse:
        """The inputs are the body; in the query stand model, deadline and the rest, see docs/jobs.md."""
        terms = read_terms(_once(request), time.time())
        if request.headers.get("content-type", "").lower().startswith("multipart/"):
            raise invalid("the inputs of a job are the body itself, not a form: curl --data-binary @file, not -F")
        if request.headers.get("content-encoding", "").lower() not in ("", "identity"):
            raise invalid("the inputs of a job are taken as they are: send them without Content-Encoding")
        try:
            job = await intake.take(terms, request.stream(), partial(_has_gone, request))
        except ClientDisconnect:
            raise invalid("the inputs were not sent to their end") from None
        return JSONResponse(_shown(jobs, job), 201)

    @routes.get("/v2/jobs")
    async def index() -> dict[str, Any]:
        return {"jobs": [_job(jobs, job) for job in jobs.known()]}

    @routes.get("/v2/jobs/{job_id}")
    async def show(job_id: str) -> dict[str, Any]:
        return _shown(jobs, jobs.get(job_id))

    @routes.get("/v2/jobs/{job_id}/results")
    async def results(job_id: str) -> FileResponse:
        path = jobs.results(job_id)
        media_type = _TYPES.get(path.suffix, "application/octet-stream")
        return FileResponse(path, media_type=media_type, filename=f"{job_id}{path.suffix}")

    @routes.post("/v2/jobs/{job_id}/cancel")
    async def cancel(job_id: str) -> dict[str, Any]:
        return _shown(jobs, await jobs.cancel(job_id))

    @routes.post("/v2/jobs/{job_id}/resume")
    async def resume(job_id: str, request: Request) -> dict[str, Any]:
        max_errors = _once(request).get("max_errors")
        if max_errors is not None and not (max_errors.isdecimal() and len(max_errors) < 16):
            raise invalid(f"max_errors must be a whole number, not {max_errors[:100]!r}")
        return _shown(jobs, await jobs.resume(job_id, None if max_errors is None else int(max_errors)))

    @routes.delete("/v2/jobs/{job_id}")
    async def remove(job_id: str) -> dict[str, Any]:
        await jobs.remove(job_id)
        return {"removed": job_id}

    return routes


def _once(request: Request) -> dict[str, str]:
    """The query's parameters. Raises ServeError for one that is there twice."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in found:
            raise invalid(f"parameter {name[:100]} is given twice")
        found[name] = value
    return found


async def _has_gone(request: Request) -> bool:
    """Whether the client has closed the connection. Behind a large body nobody reads from it until this asks."""
    await request.is_disconnected()
    await asyncio.sleep(CLOSED_S)
    return await request.is_disconnected()


def _job(jobs: Jobs, job: Job) -> dict[str, Any]:
    asked = job.asked
    found: dict[str, Any] = {
        "id": job.id,
        "name": asked.name,
        "model": asked.model,
        "version": asked.version,
        "state": job.state,
        "items": asked.items,
        "done": job.done,
        "errors": job.errors,
        "created": _clock(job.created_s),
        "deadline": None if asked.deadline_s is None else _clock(asked.deadline_s),
        "late_s": late_s(job, time.time()),
        **jobs.progress(job),
    }
    warnings = []
    if found.get("left_alone"):
        slices = ", ".join(f"{name} for {seconds:.0f} s" for name, seconds in found["left_alone"].items())
        warnings.append(f"workers died of its batches; so that they do not stay out it leaves alone {slices}")
    found.pop("left_alone", None)
    if job.reason:
        found["reason"] = job.reason
    if job.ended_s is not None:
        found["ended"] = _clock(job.ended_s)
    if found.get("in_time") is False and "ends_in_s" in found:
        end = _clock(time.time() + found["ends_in_s"])
        behind = "" if not found["behind"] else "; until then jobs that come first hold the slices"
        warnings.append(f"it cannot end by its deadline: the earliest end is {end}{behind}")
    found.pop("behind", None)
    if warnings:
        found["warning"] = "; ".join(warnings)
    return found


def _shown(jobs: Jobs, job: Job) -> dict[str, Any]:
    errors = [_error(each) for each in job.first_errors]
    asked = job.asked
    more = {"format": asked.format, "output": asked.output, "max_errors": asked.max_errors, "first_errors": errors}
    return {**_job(jobs, job), **more}


def _error(error: ItemError) -> dict[str, Any]:
    """As in the results."""
    return {"item": error.item, **({"name": error.name} if error.name else {}), "error": error.error}


def _clock(seconds: float) -> str:
    at = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return at.isoformat(timespec="seconds").replace("+00:00", "Z")
