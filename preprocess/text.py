"""Text into token ids, by the `tokenizers` library and a tokenizer.json beside the model."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer

from preprocess.errors import BadInputError
from preprocess.items import Item
from preprocess.pipeline import PipelineError
from preprocess.steps import TextSteps

# Of one text. Tokenizing takes about a second for each 2 MB.
MAX_BYTES = 256 << 10


def read_text(data: bytes, steps: TextSteps) -> Item:
    """Ids, special tokens included. Raises BadInputError."""
    if len(data) > MAX_BYTES:
        raise BadInputError(f"a text of {len(data)} bytes; at most {MAX_BYTES} are taken")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"{len(data)} bytes that are not text in UTF-8: {error.reason} at byte {error.start}"
        ) from None
    ids = load(steps).encode(text).ids
    if not ids:
        raise BadInputError("a text without a token in it")
    if len(ids) > steps.max_tokens:
        raise BadInputError(f"a text of {len(ids)} tokens; at most {steps.max_tokens} are taken")
    return Item(np.array(ids, np.int64), len(ids))


@lru_cache(maxsize=64)
def load(steps: TextSteps) -> Tokenizer:
    """Raises PipelineError."""
    try:
        tokenizer = Tokenizer.from_file(steps.tokenizer)
    except Exception as error:  # the library's own are bare Exceptions
        raise PipelineError(f"preprocess.text.tokenizer {steps.tokenizer} cannot be read: {error}") from error
    tokenizer.no_padding()  # that is done for the whole request, to its bucket
    tokenizer.no_truncation()
    if steps.truncate:
        tokenizer.enable_truncation(steps.max_tokens)
    return tokenizer
