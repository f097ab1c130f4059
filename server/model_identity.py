"""Whether a model is still the one that it was: a digest of what its answers come from.

A copy of its files has the same one, on another machine too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preprocess.pipeline import PipelineFile
from scheduler.channel import ModelSource
from scheduler.model_file import short

# Where it is done and what is refused change no answer; the tokenizer's path is another one elsewhere.
NO_MATTER: Any = {
    "device": True,
    "longest": True,
    "image": {"max_pixels"},
    "audio": {"max_seconds"},
    "text": {"tokenizer"},
}


def of(source: ModelSource, pipeline: PipelineFile | None) -> str:
    """Of a model with its preprocessing. Raises OSError where the tokenizer cannot be read."""
    if pipeline is None:
        return short((source.backend, source.digest))
    # A setting that a later release adds, with a default that changes nothing, changes nothing here either.
    steps = pipeline.model_dump_json(exclude=NO_MATTER, exclude_defaults=True)
    tokenizer = Path(pipeline.text.tokenizer).read_bytes() if pipeline.text is not None else b""
    return short((source.backend, source.digest, steps, tokenizer))
