"""Targets and deadlines: which one counts, and what is said of names that we do not know."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import terms
from server.errors import ServeError
from server.terms import OF_CALL, OF_MODEL, OF_REQUEST_DEADLINE, OF_REQUEST_SLO, read_terms, with_query

NOW = 1_000_000_000
Given = dict[str, Any]


@pytest.mark.parametrize(
    ("parameters", "model_ms", "call_ms", "due_ms", "expires_ms", "limit"),
    [
        (None, None, None, None, None, ""),
        (None, 50.0, None, 50, None, OF_MODEL),
        ({"priority": 1}, 50.0, None, 50, None, OF_MODEL),
        ({"slo_ms": 80}, 50.0, None, 80, None, OF_REQUEST_SLO),
        ({"deadline_ms": 80}, 50.0, None, 80, 80, OF_REQUEST_DEADLINE),  # not the model's
        ({"deadline_ms": 80, "slo_ms": 20}, 50.0, None, 20, 80, OF_REQUEST_SLO),
        ({"deadline_ms": 80, "slo_ms": 90}, None, None, 80, 80, OF_REQUEST_DEADLINE),
        (None, 50.0, 60_000.0, 50, 60_000, OF_MODEL),  # that a client waits long loosens nothing
        (None, None, 30.0, 30, 30, OF_CALL),
        ({"deadline_ms": 80}, 50.0, 30.0, 30, 30, OF_CALL),
        ({"timeout": 7000}, 50.0, None, 50, 7, OF_MODEL),
        ({"timeout": 7000, "deadline_ms": 5}, 50.0, None, 5, 5, OF_REQUEST_DEADLINE),
    ],
)
def test_which_limit_counts(
    parameters: Given | None,
    model_ms: float | None,
    call_ms: float | None,
    due_ms: int | None,
    expires_ms: int | None,
    limit: str,
) -> None:
    found = read_terms(parameters, NOW, model_ms, call_ms)
    at = [None if ns is None else (ns - NOW) / 1e6 for ns in (found.due_ns, found.expires_ns)]
    assert (*at, found.limit) == (due_ms, expires_ms, limit)
    assert found.limit_ms == (due_ms or 0)


@pytest.mark.parametrize(
    ("parameters", "model_strict", "strict"),
    [
        (None, False, False),
        (None, True, True),
        ({"slo_ms": 5}, True, True),
        ({"strict": True}, False, True),
        ({"strict": False}, True, False),
        ({"strict": None}, True, True),
        ({"deadline_ms": 5}, False, True),  # after it nobody waits
        ({"deadline_ms": 5, "strict": False}, False, False),
        ({"deadline_ms": 5, "slo_ms": 2}, False, False),
    ],
)
def test_what_the_request_says_of_strictness_counts_before_what_the_model_says(
    parameters: Given | None, model_strict: bool, strict: bool
) -> None:
    assert read_terms(parameters, NOW, 50.0, model_strict=model_strict).strict is strict


def test_what_comes_after_the_client_has_hung_up_is_not_computed() -> None:
    assert read_terms(None, NOW, 50.0, call_ms=20.0).strict
    assert not read_terms(None, NOW, 50.0, call_ms=60.0).strict


@pytest.mark.parametrize("value", [1, 0, "true", 1.0])
def test_strict_is_true_or_false(value: Any) -> None:
    with pytest.raises(ServeError, match="parameter strict must be true or false, not "):
        read_terms({"strict": value}, NOW, None)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("slo", "slo_ms"),
        ("SLO_MS", "slo_ms"),
        ("slo-ms", "slo_ms"),
        ("slo_us", "slo_ms"),
        ("deadline", "deadline_ms"),
        ("deadline_msec", "deadline_ms"),
        ("timeout_ms", "timeout"),
        ("timout", "timeout"),
        ("prioritty", "priority"),
        ("Strict", "strict"),
        ("stict", "strict"),
    ],
)
def test_a_name_that_was_meant_as_one_of_ours_is_refused_with_it(name: str, meant: str) -> None:
    with pytest.raises(ServeError, match=f"unknown parameter {name}; did you mean {meant}\\?"):
        read_terms({name: 5}, NOW, None)


CLIENTS_SEND = {
    "sequence_id": 0,
    "sequence_start": True,
    "sequence_end": True,
    "binary_data_output": True,
    "timeout": 0,
    "priority": 0,
    "triton_enable_empty_final_response": True,
}
SOMEBODYS_OWN = [
    "temperature",
    "max_tokens",
    "stream",
    "headers",
    "slow",
    "slot",
    "solo",
    "time",
    "s",
    "_ms",
    "",
    "x" * 99,
]


@pytest.mark.parametrize("name", [*CLIENTS_SEND, *SOMEBODYS_OWN])
def test_other_names_are_ignored(name: str) -> None:
    assert read_terms({name: CLIENTS_SEND.get(name, "a")}, NOW, 50.0) == read_terms(None, NOW, 50.0)


@given(st.dictionaries(st.text(max_size=40), st.integers() | st.text(max_size=5) | st.none(), max_size=80))
def test_any_parameters_at_all_are_taken_or_refused(parameters: Given) -> None:
    with contextlib.suppress(ServeError):
        read_terms(parameters, NOW, None)


def test_of_a_great_many_names_only_the_first_are_compared() -> None:
    many = {f"name{number}": 1 for number in range(1000)} | {"slo": 5}
    assert read_terms(many, NOW, None) == terms.Terms(NOW)


# ---- of the URL ----


def test_parameters_of_the_url_are_added_to_those_of_the_body() -> None:
    assert with_query(None, "slo_ms=50&strict=true") == {"slo_ms": 50, "strict": True}
    assert with_query({"mine": "a", "strict": False}, "deadline%5Fms=1.5") == {
        "mine": "a",
        "strict": False,
        "deadline_ms": 1.5,
    }
    assert read_terms(with_query(None, "a=b&a=c"), NOW, None) == terms.Terms(NOW), "a gateway's own"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("slo=5", r"unknown parameter slo; did you mean slo_ms\?"),
        ("slo_ms=5&slo_ms=6", "parameter slo_ms is given twice"),
        ("priority=1", "parameter priority is given twice; expected it once, in the URL or in the body"),
        ("slo_ms=fast", "parameter slo_ms must be a positive number of milliseconds, not 'fast'"),
        ("slo_ms=" + "9" * 5000, "parameter slo_ms must be a positive number"),
        ("slo_ms=", "parameter slo_ms must be a positive number of milliseconds, not ''"),
        ("strict=1", "parameter strict must be true or false, not 1"),
        ("strict", "parameter strict must be true or false, not ''"),
        ("strict=null", "parameter strict must be true or false, not 'null'"),
        ("timeout=1.5", "parameter timeout must be a whole number of at least 0, not 1.5"),
        ("&".join(f"a{number}=1" for number in range(100)), "the URL has more than 32 parameters"),
    ],
)
def test_what_is_wrong_in_the_url_is_named(query: str, message: str) -> None:
    with pytest.raises(ServeError, match=message):
        read_terms(with_query({"priority": 2}, query), NOW, None)


@given(st.text())
def test_any_query_at_all_is_taken_or_refused(query: str) -> None:
    with contextlib.suppress(ServeError):
        read_terms(with_query(None, query), NOW, None)
