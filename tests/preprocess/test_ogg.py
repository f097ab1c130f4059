"""Ogg: a clip that is cut off, damaged or has a hole is refused, not shorter."""

from __future__ import annotations

import struct
import time
from itertools import pairwise

import pytest

from preprocess import ogg, sound
from preprocess.errors import BadInputError
from tests.preprocess.sounds import RATE, sound_file, speech_like

SUBTYPES = ["VORBIS", "OPUS"]
CLIP = speech_like(8.0)
FILES = {subtype: sound_file(CLIP, kind="OGG", subtype=subtype) for subtype in SUBTYPES}


def pages(data: bytes) -> list[bytes]:
    begins = [at for at in range(len(data)) if data.startswith(b"OggS\0", at)]
    return [data[begin:end] for begin, end in pairwise([*begins, len(data)])]


def checksum(page: bytes) -> int:
    """Bit by bit, as RFC 3533 has it."""
    register = 0
    for byte in page:
        register ^= byte << 24
        for _ in range(8):
            register = (register << 1 ^ (0x04C11DB7 if register >> 31 else 0)) & 0xFFFFFFFF
    return register


def page(sequence: int, *, flags: int = 0, stream: int = 1, body: bytes = b"") -> bytes:
    head = struct.pack("<4sBBqII", b"OggS", 0, flags, 0, stream, sequence)
    rest = bytes([1, len(body)]) + body if body else b"\0"
    return head + struct.pack("<I", checksum(head + bytes(4) + rest)) + rest


def renumbered(data: bytes, stream: int) -> bytes:
    """The same pages, of another stream."""
    made = b""
    for each in pages(data):
        blank = each[:14] + struct.pack("<I", stream) + each[18:22] + bytes(4) + each[26:]
        made += blank[:22] + struct.pack("<I", checksum(blank)) + blank[26:]
    return made


def refusal(data: bytes) -> str:
    with pytest.raises(BadInputError) as refused:
        sound.decode(data, RATE, 1, 20 * RATE)
    return str(refused.value)


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_a_whole_file_is_taken(subtype: str) -> None:
    assert len(pages(FILES[subtype])) > 5
    assert len(sound.decode(FILES[subtype], RATE, 1, 20 * RATE)) == len(CLIP)


@pytest.mark.parametrize("subtype", SUBTYPES)
@pytest.mark.parametrize("share", [0.3, 0.7, 0.999])
def test_a_file_that_is_cut_off_is_refused(subtype: str, share: float) -> None:
    data = FILES[subtype]
    assert "an Ogg file that is cut off: its page at byte " in refusal(data[: int(share * len(data))])
    begin_of_last = len(data) - len(pages(data)[-1])
    assert f"page at byte {begin_of_last} is not whole" in refusal(data[: begin_of_last + 2])


@pytest.mark.parametrize("subtype", SUBTYPES)
@pytest.mark.parametrize("share", [0.3, 0.7, 0.999])
def test_a_file_with_a_bit_that_is_wrong_is_refused(subtype: str, share: float) -> None:
    data = bytearray(FILES[subtype])
    data[int(share * len(data))] ^= 0x10
    assert "an Ogg file that is damaged: the checksum of its page at byte " in refusal(bytes(data))


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_a_file_without_one_of_its_pages_is_refused(subtype: str) -> None:
    there = pages(FILES[subtype])
    assert "pages are missing: page 5 comes after 3" in refusal(b"".join(there[:4] + there[5:]))


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_a_stream_that_does_not_say_that_it_has_ended_is_taken(subtype: str) -> None:
    """As one is that was recorded live."""
    begun = b"".join(pages(FILES[subtype])[:-1])
    assert 0 < len(sound.decode(begun, RATE, 1, 20 * RATE)) < len(CLIP)


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_of_recordings_one_after_the_other_none_is_dropped_in_silence(subtype: str) -> None:
    data = FILES[subtype]
    for second in (data, renumbered(data, 7)):
        assert "several recordings one after the other; one is taken" in refusal(data + second)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (page(0) + b"TAG", "no page at byte 27, where one belongs"),
        (page(0) + page(1)[:20], "page at byte 27 is not whole"),
        (page(0) + page(1, body=b"sound")[:-1], "page at byte 27 is not whole"),
        (page(0)[:4] + b"\1" + page(0)[5:], "an Ogg file of version 1; 0 is taken"),
        (page(2**32 - 1) + page(0) + page(2), "page 2 comes after 0"),
        (page(0) + page(0), "page 0 comes after 0"),
    ],
)
def test_pages_that_are_none(data: bytes, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        ogg.check(data, 1.0)


def test_streams_side_by_side_are_each_numbered_by_themselves() -> None:
    ogg.check(page(0, flags=2) + page(0, flags=2, stream=9) + page(1, stream=9) + page(1), 1.0)


def test_how_many_pages_are_looked_at_follows_from_the_seconds_that_are_taken() -> None:
    """What that costs is a limit that is promised."""
    made = [page(sequence) for sequence in range(1200)]
    ogg.check(b"".join(made[:1100]), 1.0)
    hostile = b"".join(made) + page(1200) * ((32 << 20) // 27)
    begin_ns = time.thread_time_ns()
    with pytest.raises(BadInputError, match="an Ogg file of more than 1100 pages, for 1 s at most"):
        ogg.check(hostile, 1.0)
    assert time.thread_time_ns() - begin_ns < 50e6
