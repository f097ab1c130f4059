"""Sound decoded on the CPU: PCM16 by numpy, the rest by libsndfile; mixed to mono, resampled by soxr."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import soundfile
import soxr

from preprocess import ogg, wav
from preprocess.errors import BadInputError

EXPECTED = "a WAV, FLAC, Ogg or MP3 file"
# Encoded bytes of one clip.
MAX_BYTES = 32 << 20
MAX_CHANNELS = 8
LOWEST_RATE, HIGHEST_RATE = 1000, 192_000
# Louder than full scale by so much is no sound; its square would be infinite.
LOUDEST = 1000.0
# Read from libsndfile at a time: what is too long is noticed before it is all in memory.
BLOCK_FRAMES = 1 << 16

Samples = np.ndarray[Any, np.dtype[np.float32]]


def decode(data: bytes, sample_rate: int, least_samples: int, most_samples: int) -> Samples:
    """One clip, mono, at `sample_rate`; the limits are in samples of it. Raises BadInputError."""
    if not data:
        raise BadInputError(f"no bytes; expected {EXPECTED}")
    if len(data) > MAX_BYTES:
        raise BadInputError(f"a sound of {len(data)} bytes; at most {MAX_BYTES} are taken")
    most_seconds = most_samples / sample_rate
    mono, rate = _by_numpy(data, most_seconds) if _is_wav(data) else _by_libsndfile(data, most_seconds)
    made = mono if rate == sample_rate else soxr.resample(mono, rate, sample_rate, quality="HQ")
    if len(made) < least_samples:
        ms, least_ms = round(1e3 * len(mono) / rate, 3), round(1e3 * least_samples / sample_rate, 3)
        raise BadInputError(f"a sound of {ms:g} ms; at least {least_ms:g} ms are needed")
    # Resampling may make a sample more than the clip's length is.
    return np.ascontiguousarray(made[:most_samples], np.float32)


def _is_wav(data: bytes) -> bool:
    return data.startswith(b"RIFF") and data[8:12] == b"WAVE"


def _check(channels: int, rate: int, frames: int, most_seconds: float) -> None:
    if not 1 <= channels <= MAX_CHANNELS:
        raise BadInputError(f"a sound of {channels} channels; 1 to {MAX_CHANNELS} are taken")
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise BadInputError(f"a sound of {rate} samples a second; {LOWEST_RATE} to {HIGHEST_RATE} are taken")
    if frames > most_seconds * rate:
        raise BadInputError(f"a sound of {frames / rate:.1f} s; at most {most_seconds:g} s are taken")


def _by_numpy(data: bytes, most_seconds: float) -> tuple[Samples, int]:
    header = wav.inspect(data)
    if header.format != wav.PCM or header.bits != 16:
        return _by_libsndfile(wav.with_length(data, header), most_seconds)
    _check(header.channels, header.sample_rate, header.frames, most_seconds)
    values = np.frombuffer(data, "<i2", header.frames * header.channels, header.begin)
    return _mono(values.reshape(-1, header.channels), 32768.0), header.sample_rate


def _mono(frames: np.ndarray[Any, Any], full_scale: float) -> Samples:
    """The mean of the channels. One after the other: numpy's own mean along so short an axis takes 30 times longer."""
    mixed = frames[:, 0].astype(np.float32)
    for channel in range(1, frames.shape[1]):
        mixed += frames[:, channel]
    mixed *= np.float32(1 / (full_scale * frames.shape[1]))
    return mixed


def _by_libsndfile(data: bytes, most_seconds: float) -> tuple[Samples, int]:
    """Through a file in memory: libsndfile reads it without the GIL, which callbacks to Python would hold."""
    if not _is_known(data):
        raise BadInputError(f"{len(data)} bytes that are not {EXPECTED}")
    if data.startswith(b"OggS"):
        ogg.check(data, most_seconds)
    file = os.memfd_create("sound", os.MFD_CLOEXEC)
    try:
        os.truncate(file, len(data))
        os.pwrite(file, data, 0)
        with soundfile.SoundFile(file, closefd=False) as sound:
            _check(sound.channels, sound.samplerate, sound.frames, most_seconds)
            most_frames = int(most_seconds * sound.samplerate)
            with np.errstate(all="ignore"):  # whatever stands in a file of floats; it is looked at below
                mono = np.concatenate([np.empty(0, np.float32), *_blocks(sound, most_frames)])
            rate: int = sound.samplerate
            announced: int = sound.frames
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise BadInputError(f"a sound that cannot be read: {_reason(error, len(data))}") from None
    finally:
        os.close(file)
    if len(mono) < announced:
        raise BadInputError(f"a sound that is cut off: {announced} samples are announced, {len(mono)} are there")
    if not np.abs(mono).max(initial=0) <= LOUDEST:
        raise BadInputError(f"a sound with samples that are not finite, or over {LOUDEST:g} times full scale")
    return mono, rate


def _reason(error: Exception, nbytes: int) -> str:
    """Without the file's name, which is our own; and libsndfile does not say the truth of what is not MP3."""
    message: str = getattr(error, "error_string", str(error))
    return f"its {nbytes} bytes hold no MP3 frame that can be decoded" if "possibly a pipe" in message else message


def _blocks(sound: soundfile.SoundFile, most_frames: int) -> Iterator[Samples]:
    frames = 0
    while len(block := sound.read(BLOCK_FRAMES, "float32", always_2d=True)):
        frames += len(block)
        if frames > most_frames:
            raise BadInputError(f"a sound of more than the {most_frames / sound.samplerate:g} s that are taken")
        yield _mono(block, 1.0)


def _is_known(data: bytes) -> bool:
    if data.startswith((b"fLaC", b"OggS", b"ID3")) or _is_wav(data):
        return True
    return len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0  # MPEG audio, without a tag before it
