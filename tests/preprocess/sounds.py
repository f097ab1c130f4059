"""Clips, and reference features: numpy in float64, from the published definitions, by other means than ours."""

from __future__ import annotations

import io
import struct
from functools import cache
from typing import Any

import numpy as np
import soundfile

Array = np.ndarray[Any, np.dtype[np.float64]]
RATE = 16_000


@cache
def speech_like(seconds: float, rate: int = RATE, channels: int = 1) -> Array:
    """[samples, channels]: gliding harmonics that come and go, over a little noise; within -1..1."""
    rng = np.random.default_rng(int(seconds * 1000) + channels)
    t = np.arange(round(seconds * rate)) / rate
    pitch = 120 + 60 * np.sin(2 * np.pi * 0.7 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    loudness = np.clip(np.sin(2 * np.pi * 1.3 * t), 0, None) ** 2
    voice = np.asarray(sum(np.sin(k * phase) / k for k in range(1, 25)))
    sounds = [0.2 * loudness * voice + 0.002 * rng.standard_normal(len(t)) for _ in range(channels)]
    return np.stack(sounds, axis=1)


def sound_file(samples: Array, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """In blocks: libsndfile's Vorbis encoder dies of a long one."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, samples.shape[1], subtype, format=kind) as file:
        for at in range(0, len(samples), RATE):
            file.write(samples[at : at + RATE])
    return buffer.getvalue()


def wav(samples: Array, rate: int = RATE, data_size: int | None = None, **header: int) -> bytes:
    """PCM16 by hand; `data_size` and header fields may lie."""
    values = np.round(samples * 32768).clip(-32768, 32767).astype("<i2")
    channels = header.get("channels", samples.shape[1])
    body = values.tobytes()
    fields = {"frame_bytes": 2 * channels, "bits": 16} | header
    described = struct.pack("<HHIIHH", 1, channels, rate, 0, fields["frame_bytes"], fields["bits"])
    size = len(body) if data_size is None else data_size
    head = b"WAVEfmt " + struct.pack("<I", 16) + described + b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", len(head) + len(body)) + head + body


def float_wav(samples: Array, rate: int = RATE) -> bytes:
    return sound_file(samples, rate, subtype="FLOAT")


# ---- references ----


def slaney_filters(mels: int, fft: int, rate: int) -> Array:
    """[mels, fft // 2 + 1] by interpolating each triangle's three corners; area 1."""

    def to_mel(hz: float) -> float:
        return 3 * hz / 200 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)

    def to_hz(mel: float) -> float:
        return 200 * mel / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    corners = [to_hz(mel) for mel in np.linspace(0, to_mel(rate / 2), mels + 2)]
    bins = np.arange(fft // 2 + 1) * rate / fft
    filters = [np.interp(bins, corners[k : k + 3], [0, 1, 0]) * 2 / (corners[k + 2] - corners[k]) for k in range(mels)]
    return np.array(filters)


def energies(samples: Array, fft: int, window: Array, frames: int) -> Array:
    """[fft // 2 + 1, frames], each frame by itself; `samples` begin half a window before the clip."""
    left = (fft - len(window)) // 2
    columns = []
    for frame in range(frames):
        piece = np.zeros(fft)
        piece[left : left + len(window)] = samples[frame * 160 + left : frame * 160 + left + len(window)] * window
        columns.append(np.abs(np.fft.rfft(piece)) ** 2)
    return np.array(columns).T


def nemo(samples: Array) -> Array:
    """NeMo's AudioToMelSpectrogramPreprocessor in evaluation, as configured for FastConformer: no dither."""
    emphasised = np.append(samples[0], samples[1:] - 0.97 * samples[:-1])
    padded = np.pad(emphasised, 256)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)  # symmetric
    energy = energies(padded, 512, window, len(samples) // 160)
    logarithms = np.log(slaney_filters(80, 512, RATE) @ energy + 2.0**-24)
    centred = logarithms - logarithms.mean(axis=1, keepdims=True)
    return np.asarray(centred / (logarithms.std(axis=1, ddof=1, keepdims=True) + 1e-5))


def whisper(samples: Array, mels: int = 80) -> Array:
    """openai/whisper's log_mel_spectrogram of a clip that is filled up to 30 s."""
    padded = np.pad(np.pad(samples, (0, 30 * RATE - len(samples))), 200, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)  # periodic
    energy = slaney_filters(mels, 400, RATE) @ energies(padded, 400, window, 3000)
    logarithms = np.log10(np.maximum(energy, 1e-10))
    return np.asarray((np.maximum(logarithms, logarithms.max() - 8) + 4) / 4)
