"""Whether a model is still the one that it was: a digest of what its answers come from.

A copy of its files has the same one, on another machine too.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from preprocess.pipeline import PipelineFile
from scheduler.channel import ModelSource

DIGEST_BYTES = 6


def of_file(source: ModelSource) -> str:
    """Of a model file, without reading it: both kinds are zip archives, which have a checksum of each member.

    Empty where there is no such file.
    """
    try:
        with zipfile.ZipFile(source.path) as archive:
            return _digest([(each.filename, each.CRC, each.file_size) for each in archive.infolist()])
    except (OSError, ValueError, zipfile.BadZipFile):
        return ""


def of(source: ModelSource, pipeline: PipelineFile | None) -> str:
    """Of a model with its preprocessing."""
    steps, tokenizer = "", b""
    if pipeline is not None:
        # Where it is done and what is refused change no answer; the tokenizer's path is another elsewhere.
        steps = pipeline.model_dump_json(exclude={"device": True, "longest": True, "text": {"tokenizer"}})
        if pipeline.text is not None:
            tokenizer = Path(pipeline.text.tokenizer).read_bytes()
    return _digest((source.backend, of_file(source), steps, hashlib.blake2b(tokenizer).hexdigest()))


def _digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=DIGEST_BYTES).hexdigest()
