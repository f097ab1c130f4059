"""What a request asks of the scheduler in its parameters, or in those of its URL. Pure.

Which names clients send without asking us: tritonclient and perf_analyzer priority, timeout, sequence_* and
binary_data_output, and whatever their users add. What we do not know we ignore, as Triton does, but for names that
were surely meant as one of ours: a target that is silently not kept is the worst answer.
"""

from __future__ import annotations

from difflib import get_close_matches
from itertools import islice
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from scheduler.messages import DEFAULT_PRIORITY
from server.errors import Fault, ServeError, invalid

# Names as they are compared: without unit, in small letters.
_OURS = {
    "slo": "slo_ms",
    "deadline": "deadline_ms",
    "timeout": "timeout",
    "priority": "priority",
    "strict": "strict",
}
_KNOWN = frozenset([*_OURS.values(), "binary_data_output", "sequence_id", "sequence_start", "sequence_end"])
_UNITS = ("ms", "msec", "msecs", "millis", "us", "usec", "micros", "s", "sec", "secs", "seconds")
# So alike is a slip of the fingers: timout, prioritty. What is less so may be somebody's own.
ALIKE = 0.87
# Longer names are none of ours, and more of them nobody sends by hand: comparing takes time.
NAME_CHARS = 32
LOOKED_AT = 32

OF_REQUEST_SLO = "slo_ms of the request"
OF_REQUEST_DEADLINE = "deadline_ms of the request"
OF_CALL = "the deadline of the gRPC call"
OF_MODEL = "slo_ms in the model's serving.yaml"


class Terms(msgspec.Struct, frozen=True):
    """Points in time in ns of the monotonic clock. `limit`: where the due time comes from, for an error.

    `strict`: refused rather than served late.
    """

    arrival_ns: int
    due_ns: int | None = None
    expires_ns: int | None = None
    priority: int = DEFAULT_PRIORITY
    limit: str = ""
    strict: bool = False

    @property
    def limit_ms(self) -> float:
        return 0.0 if self.due_ns is None else (self.due_ns - self.arrival_ns) / 1e6


def read_terms(
    parameters: dict[str, Any] | None,
    arrival_ns: int,
    model_slo_ms: float | None,
    call_ms: float | None = None,
    *,
    model_strict: bool = False,
) -> Terms:
    """Deadlines and priority of a request. Raises ServeError for values that make no sense.

    The model's own target and strictness count for requests that name none. `call_ms`: how long the client waits,
    where that is known; it bounds the request's own limits.
    """
    if not parameters and call_ms is None:
        due_ns = None if model_slo_ms is None else arrival_ns + int(model_slo_ms * 1e6)
        return Terms(arrival_ns, due_ns, limit="" if due_ns is None else OF_MODEL, strict=model_strict)
    parameters = parameters or {}
    _check_names(parameters)
    slo_ms = _positive(parameters, "slo_ms")
    deadline_ms = _positive(parameters, "deadline_ms")
    timeout_us = _whole(parameters, "timeout")
    limits = [(slo_ms, OF_REQUEST_SLO), (deadline_ms, OF_REQUEST_DEADLINE), (call_ms, OF_CALL)]
    if slo_ms is None and deadline_ms is None:
        limits.append((model_slo_ms, OF_MODEL))
    due_ms, limit = min(((ms, limit) for ms, limit in limits if ms is not None), default=(None, ""))
    expires = [arrival_ns + int(ms * 1e6) for ms in (deadline_ms, call_ms) if ms is not None]
    if timeout_us:
        expires.append(arrival_ns + timeout_us * 1000)
    return Terms(
        arrival_ns,
        None if due_ms is None else arrival_ns + int(due_ms * 1e6),
        min(expires, default=None),
        _whole(parameters, "priority") or DEFAULT_PRIORITY,
        limit,
        # After a deadline nobody waits any more, so there is no late answer to it.
        _flag(parameters, "strict", model_strict or limit in (OF_REQUEST_DEADLINE, OF_CALL)),
    )


def with_query(parameters: dict[str, Any] | None, query: str) -> dict[str, Any]:
    """The parameters of a body, and those of its URL: a bare file or a form has no others. Raises ServeError."""
    found = dict(parameters or {})
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=LOOKED_AT)
    except ValueError:
        raise invalid(f"the URL has more than {LOOKED_AT} parameters") from None
    for name, text in pairs:
        if name in found and name in _OURS.values():
            raise invalid(f"parameter {name} is given twice; expected it once, in the URL or in the body")
        found[name] = _value(text[:NAME_CHARS])
    return found


def _value(text: str) -> bool | int | float | str:
    """A number, true or false as JSON has it; else the text, of which is said what was expected instead."""
    try:
        value = msgspec.json.decode(text, type=bool | int | float)
    except msgspec.MsgspecError:
        return text
    return value


def _check_names(parameters: dict[str, Any]) -> None:
    if parameters.get("sequence_id"):
        raise ServeError(Fault.UNSUPPORTED, "sequences are not supported; leave out sequence_id")
    if parameters.keys() <= _KNOWN:
        return
    for name in parameters:
        if name.startswith("triton_") and name != "triton_enable_empty_final_response":
            raise invalid(f"parameter {name[:NAME_CHARS]} is reserved")
    unknown = (name for name in parameters if name not in _KNOWN)
    for name in islice(unknown, LOOKED_AT):
        if meant := _meant(name):
            raise invalid(f"unknown parameter {name}; did you mean {meant}?")


def _meant(name: str) -> str | None:
    """Which of our parameters was surely meant."""
    words = name.lower().replace("-", "_")
    stem, _, unit = words.rpartition("_")
    near = get_close_matches(stem if unit in _UNITS else words, _OURS, 1, ALIKE) if len(name) <= NAME_CHARS else []
    return _OURS[near[0]] if near else None


def _positive(parameters: dict[str, Any], name: str) -> float | None:
    value = parameters.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise invalid(f"parameter {name} must be a positive number of milliseconds, not {value!r}")
    return float(value)


def _whole(parameters: dict[str, Any], name: str) -> int:
    value = parameters.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise invalid(f"parameter {name} must be a whole number of at least 0, not {value!r}")
    return value


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise invalid(f"parameter {name} must be true or false, not {value!r}")
    return value
