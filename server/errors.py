"""Every way a request can end badly, and the one table from it to HTTP and gRPC status codes. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import Enum

import grpc

from scheduler.messages import Reason


class Fault(Enum):
    """(HTTP status, gRPC status). As Triton's, but for 429 and 504, which say what to do next."""

    INVALID = (400, grpc.StatusCode.INVALID_ARGUMENT)
    FORBIDDEN = (403, grpc.StatusCode.PERMISSION_DENIED)
    NOT_FOUND = (404, grpc.StatusCode.NOT_FOUND)
    CONFLICT = (409, grpc.StatusCode.FAILED_PRECONDITION)
    TOO_LARGE = (413, grpc.StatusCode.INVALID_ARGUMENT)
    REFUSED = (429, grpc.StatusCode.RESOURCE_EXHAUSTED)
    INTERNAL = (500, grpc.StatusCode.INTERNAL)
    UNSUPPORTED = (501, grpc.StatusCode.UNIMPLEMENTED)
    UNAVAILABLE = (503, grpc.StatusCode.UNAVAILABLE)
    DEADLINE = (504, grpc.StatusCode.DEADLINE_EXCEEDED)

    def __init__(self, http: int, grpc_status: grpc.StatusCode) -> None:
        self.http = http
        self.grpc = grpc_status


class ServeError(Exception):
    """Ends a request with a status and one sentence for the client.

    `reason` labels it in the metrics; `retry_after_s` is set where a later try has a chance.
    """

    def __init__(self, fault: Fault, message: str, *, reason: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.fault = fault
        self.message = message
        self.reason = reason or fault.name.lower()
        self.retry_after_s = retry_after_s

    @property
    def retry_after_header(self) -> bytes | None:
        """HTTP's Retry-After: whole seconds, at least one."""
        return None if self.retry_after_s is None else b"%d" % max(1, math.ceil(self.retry_after_s))


def invalid(message: str) -> ServeError:
    return ServeError(Fault.INVALID, message)


def both_given(encoded: str, ready: Iterable[str]) -> str:
    """What is wrong where an item, or a request, has what a pipeline takes and what it makes."""
    return f"got both input {encoded}, encoded, and the ready tensors [{', '.join(ready)}]; expected one or the other"


def internal() -> ServeError:
    """For what is our own fault; the caller has logged it."""
    return ServeError(Fault.INTERNAL, "internal error; the server's log has the details")


def from_refusal(
    reason: Reason, retry_after_s: float, detail: str, model: str, limit: str, limit_ms: float
) -> ServeError:
    """What the scheduler's reasons mean to a client. `limit`: whose due time it is, `limit_ms` after the arrival."""
    match reason:
        case Reason.QUEUE_FULL:
            message = f"the queue of model {model} is full"
            return ServeError(Fault.REFUSED, message, reason=reason, retry_after_s=retry_after_s)
        case Reason.SLO_UNREACHABLE:
            message = (
                f"model {model} cannot answer in time: {limit} is {round(limit_ms, 4):g} ms, the estimate{detail} is "
                f"{limit_ms + retry_after_s * 1e3:.1f} ms; try again later, allow more, or send strict: false to be "
                f"answered late"
            )
            return ServeError(Fault.REFUSED, message, reason=reason, retry_after_s=retry_after_s)
        case Reason.OVERLOADED:
            message = (
                f"model {model} cannot answer even in ten times what it may take: {limit} is {round(limit_ms, 4):g} "
                f"ms, the estimate{detail} is {10 * limit_ms + retry_after_s * 1e3:.1f} ms; try again later, or allow "
                f"more"
            )
            return ServeError(Fault.REFUSED, message, reason=reason, retry_after_s=retry_after_s)
        case Reason.EXPIRED:
            message = "the request's time ran out before it was started (timeout or deadline_ms)"
            return ServeError(Fault.DEADLINE, message, reason=reason)
        case Reason.UNAVAILABLE:
            message = detail or f"no slice serves model {model} now"
            return ServeError(Fault.UNAVAILABLE, message, reason=reason)
        case Reason.CRASHED:
            message = f"the worker died twice while running this request ({detail}); it was not tried again"
            return ServeError(Fault.INTERNAL, message, reason=reason)
        case Reason.MODEL_FAILED:
            return ServeError(Fault.INTERNAL, f"model {model} failed on this input: {detail}", reason=reason)
