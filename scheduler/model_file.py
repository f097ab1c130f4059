"""What a model file holds, in short: equal for a copy, another for other weights or other code."""

from __future__ import annotations

import hashlib
import zipfile

DIGEST_BYTES = 6


def digest(path: str) -> str:
    """Without reading it all: both kinds of model file are zip archives, which have a checksum of each member.

    Their members are below a folder that has the name under which the file was saved; it does not count. Empty where
    there is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [(each.filename.partition("/")[2], each.CRC, each.file_size) for each in archive.infolist()]
    except (OSError, ValueError, zipfile.BadZipFile):
        return ""
    return short(members)


def short(value: object) -> str:
    """Of what has the same `repr` everywhere."""
    return hashlib.blake2b(repr(value).encode(), digest_size=DIGEST_BYTES).hexdigest()
