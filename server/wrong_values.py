"""What pydantic finds wrong with a value, in words for whoever wrote the file, the flag or the body. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# By pydantic's types of errors; in braces stands what it gives with them.
_SENTENCES = {
    "expected a section, which has settings by their names": ("model_type", "dict_type", "model_attributes_type"),
    "expected true or false": ("bool_type", "bool_parsing"),
    "expected a number": ("float_type", "float_parsing"),
    "expected a finite number": ("finite_number",),
    "expected a whole number": ("int_type", "int_parsing", "int_parsing_size", "int_from_float"),
    "expected text": ("string_type",),
    "expected the name of a file or folder": ("path_type",),
    "expected a list": ("list_type",),
    "expected {expected}": ("literal_error",),
    "expected more than {gt}": ("greater_than",),
    "expected {ge} or more": ("greater_than_equal",),
    "expected less than {lt}": ("less_than",),
    "expected {le} at most": ("less_than_equal",),
    "expected {min_length} or more of them": ("too_short",),
    "expected {min_length} or more characters": ("string_too_short",),
    "expected keys that are text": ("invalid_key",),
    "is missing": ("missing",),
    "is not known here": ("extra_forbidden",),
    "not JSON: {error}": ("json_invalid",),
}
_BY_TYPE = {kind: sentence for sentence, kinds in _SENTENCES.items() for kind in kinds}


def said(error: Mapping[str, Any]) -> str:
    """Of one of a ValidationError's errors."""
    sentence = _BY_TYPE.get(error["type"])
    if sentence is None:
        return str(error["msg"]).removeprefix("Value error, ")
    context: Mapping[str, Any] = error.get("ctx", {})
    return sentence.format(
        **{name: f"{value:.15g}" if isinstance(value, float) else value for name, value in context.items()}
    )
