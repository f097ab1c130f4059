"""What the log says of a model that fails: all of it once, then the sentence."""

from __future__ import annotations

from scheduler.channel import Failed
from scheduler.failures import MOST_KNOWN, Failures


def failed(detail: str, key: str = "a/b/2#7") -> Failed:
    return Failed(1, key, detail, "Traceback: ...")


def test_a_traceback_is_logged_once_for_each_model_and_error() -> None:
    failures = Failures()
    first = failures.fields(failed("IndexError: 17 is too much"))
    sentence = {"model": "a/b", "version": "2", "detail": "IndexError: 17 is too much"}
    assert first == {**sentence, "full": "Traceback: ..."}
    assert "full" not in failures.fields(failed("IndexError: 18 is too much")), "the same but for its number"
    assert "full" in failures.fields(failed("ValueError: 17 is too much"))
    assert "full" in failures.fields(failed("IndexError: 17 is too much", "other/1#8"))


def test_errors_that_all_differ_are_not_remembered_for_ever() -> None:
    failures = Failures()
    words = [chr(0x4E00 + number) for number in range(MOST_KNOWN + 5)]
    assert sum("full" in failures.fields(failed(word)) for word in words) == MOST_KNOWN
