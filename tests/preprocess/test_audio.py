"""Sound: features against references, every format, and what is none."""

from __future__ import annotations

import io
import struct
import time
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from pydantic import ValidationError

from preprocess import sound
from preprocess.clips import read_clip
from preprocess.errors import BadInputError
from preprocess.pipeline import PipelineError, PipelineFile, checked
from preprocess.places import write_items
from preprocess.steps import AudioSteps
from preprocess.work import read_item, write_item
from tests.preprocess.sounds import RATE, float_wav, nemo, sound_file, speech_like, wav, whisper

NEMO = AudioSteps(preset="nemo-80")
WHISPER = AudioSteps(preset="whisper")
PIPELINE = PipelineFile(input="sound", output="x", length="frames", audio=NEMO)


def of_pcm16(samples: Any) -> Any:
    """What is left of samples once they are in 16 bits, mono."""
    return np.round(samples * 32768).clip(-32768, 32767).mean(axis=1) / 32768


@pytest.mark.parametrize("seconds", [0.02, 0.5, 3.3, 25.0])
def test_features_are_nemos(seconds: float) -> None:
    samples = speech_like(seconds)
    features, frames = read_clip(wav(samples), NEMO)
    expected = nemo(of_pcm16(samples))
    assert (features.dtype, features.shape, frames) == (np.float32, expected.shape, expected.shape[1])
    assert np.abs(features - expected).max() < 1e-5


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("seconds", [0.001, 3.3, 30.0])
def test_features_are_whispers(seconds: float, mels: int) -> None:
    samples = speech_like(seconds)
    features, frames = read_clip(wav(samples), AudioSteps(preset="whisper", mels=mels))
    assert (features.shape, frames) == ((mels, 3000), len(samples) // 160)
    assert np.abs(features - whisper(of_pcm16(samples), mels)).max() < 1e-5


def test_a_loud_tone_beside_almost_nothing_is_as_exact() -> None:
    """Where float32 transforms are off by 1e-3."""
    tone = 0.9 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)[:, None]
    assert np.abs(read_clip(wav(tone), NEMO).values - nemo(of_pcm16(tone))).max() < 1e-5


def test_silence_is_no_reason_to_divide_by_nothing() -> None:
    silence = np.zeros((RATE, 1))
    assert np.abs(read_clip(wav(silence), NEMO).values).max() < 1e-5
    np.testing.assert_allclose(read_clip(wav(silence), WHISPER).values, -1.5)


def test_half_precision_is_the_same_rounded() -> None:
    data = wav(speech_like(3.3))
    half = read_clip(data, NEMO.model_copy(update={"dtype": "FP16"})).values
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, read_clip(data, NEMO).values, rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled_in_high_quality(rate: int) -> None:
    samples = speech_like(2.0, rate, 2)
    expected = nemo(soxr.resample(of_pcm16(samples).astype(np.float32), rate, RATE, quality="HQ").astype(np.float64))
    features, _ = read_clip(wav(samples, rate), NEMO)
    assert np.abs(features - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "PCM_U8"),
        ("WAV", "FLOAT"),
        ("WAV", "ULAW"),
        ("WAVEX", "PCM_16"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
    ],
)
def test_every_format_is_read(kind: str, subtype: str) -> None:
    """The samples that libsndfile gives, through our own way of reading."""
    data = sound_file(speech_like(1.5, RATE, 2), kind=kind, subtype=subtype)
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    made = sound.decode(data, RATE, 1, 2 * RATE)
    np.testing.assert_allclose(made, samples.mean(axis=1), atol=1e-6)


# ---- what is no sound, or too much of it ----

SHORT = speech_like(0.5)
GOOD = wav(SHORT)


def nan(value: float) -> bytes:
    samples = SHORT.copy()
    samples[100] = value
    return float_wav(samples)


HOSTILE = {
    "nothing": (b"", "no bytes; expected a WAV, FLAC, Ogg or MP3 file"),
    "text": (b"hello", "5 bytes that are not a WAV, FLAC, Ogg or MP3 file"),
    "no samples": (wav(np.zeros((0, 1))), "a sound of 0 ms; at least 20 ms are needed"),
    "less than two frames": (wav(np.zeros((319, 1))), "a sound of 19.938 ms; at least 20 ms"),
    "an hour": (wav(np.zeros((3600 * 1000, 1)), 1000), "a sound of 3600.0 s; at most 120 s are taken"),
    "an hour of FLAC": (sound_file(np.zeros((3600 * 8000, 1)), 8000, "FLAC"), "3600.0 s; at most 120 s are taken"),
    "an hour of Ogg": (sound_file(np.zeros((3600 * 8000, 1)), 8000, "OGG"), "3600.0 s; at most 120 s are taken"),
    "more announced than there is": (wav(SHORT, data_size=1_000_000), "announces 1000000 bytes of sound; 16000 are"),
    "no channels": (wav(SHORT, channels=0), "0 channels of 16 bits in frames of 0 bytes"),
    "100 channels": (wav(SHORT, channels=100), "a sound of 100 channels; 1 to 8 are taken"),
    "frames of another size": (wav(SHORT, frame_bytes=7), "in frames of 7 bytes"),
    "a sample a second": (wav(SHORT, 1), "a sound of 1 samples a second; 1000 to 192000 are taken"),
    "4 GHz": (wav(SHORT, 4_000_000_000), "4000000000 samples a second"),
    "no sound in it": (GOOD[:36], "cut off in its header"),
    "sound that is not described": (GOOD[:12] + GOOD[36:], "says nowhere what its samples are"),
    "many parts": (GOOD[:12] + b"LIST\0\0\0\0" * 1_000_000 + GOOD[12:], "more than 100 parts"),
    "a FLAC, cut off": (sound_file(speech_like(2.0), kind="FLAC")[:9000], "a sound that"),
    "a FLAC, its header only": (sound_file(SHORT, kind="FLAC")[:50], "a sound that"),
    "an Ogg, cut off in its header": (sound_file(SHORT, kind="OGG")[:100], "an Ogg file that is cut off"),
    "an MP3, its first bytes": (
        sound_file(SHORT, kind="MP3", subtype="MPEG_LAYER_III")[:60],
        "a sound that cannot be read: its 60 bytes hold no MP3 frame that can be decoded",
    ),
    "an MP3 of noise": (b"\xff\xfb" + bytes(5000), "a sound that"),
    "a sample that is no number": (nan(np.nan), "not finite"),
    "a sample that is infinite": (nan(np.inf), "not finite"),
    "a sample that is far too loud": (nan(1e30), "over 1000 times full scale"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_sound_is_refused_with_the_reason(name: str) -> None:
    """In little of the processor's time, which is a limit that is promised; the block that is read bounds memory."""
    data, message = HOSTILE[name]
    begin_ns = time.thread_time_ns()
    with pytest.raises(BadInputError) as refused:
        read_clip(data, NEMO)
    assert message in str(refused.value)
    assert time.thread_time_ns() - begin_ns < 50e6


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0x7FFFF000 // 6 * 6])
def test_a_length_that_was_not_known_when_it_was_written_is_the_rest_of_the_file(size: int, subtype: str) -> None:
    """As programs that write to a pipe leave it."""
    good = sound_file(SHORT, subtype=subtype)
    at = good.index(b"data") + 4
    left_open = good[:at] + struct.pack("<I", size) + good[at + 4 :]
    np.testing.assert_array_equal(read_clip(left_open, NEMO).values, read_clip(good, NEMO).values)


def test_the_shortest_clip_is_one_frame_or_two_where_each_mel_is_normalised() -> None:
    plain = NEMO.model_copy(update={"per_feature": False})
    for steps, samples in ((NEMO, 320), (plain, 160)):
        assert read_clip(wav(np.zeros((samples, 1))), steps).length == samples // 160
        with pytest.raises(BadInputError, match=f"at least {samples // 16} ms are needed"):
            read_clip(wav(np.zeros((samples - 1, 1))), steps)


def test_clips_longer_than_the_model_takes_are_refused_not_cut() -> None:
    with pytest.raises(BadInputError, match=r"a sound of 31\.0 s; at most 30 s are taken"):
        read_clip(wav(np.zeros((31 * RATE, 1))), WHISPER)
    with pytest.raises(BadInputError, match="at most 2 s are taken"):
        read_clip(wav(np.zeros((3 * RATE, 1))), NEMO.model_copy(update={"max_seconds": 2.0}))


# ---- into the model's inputs ----


def test_clips_of_different_lengths_together_are_each_alone() -> None:
    files = [wav(speech_like(seconds)) for seconds in (0.5, 3.3, 1.7)]
    clips = [read_item(PIPELINE, data) for data in files]
    frames = max(clip.length for clip in clips)
    x, lengths = np.full((3, 80, frames), np.nan, np.float32), np.full(3, -1, np.int64)
    write_items(PIPELINE, clips, frames, {"x": memoryview(x).cast("B"), "frames": memoryview(lengths).cast("B")})
    assert lengths.tolist() == [50, 330, 170]
    for row, data, length in zip(x, files, lengths, strict=True):
        assert np.abs(row[:, :length] - read_clip(data, NEMO).values).max() < 1e-5
        assert not row[:, length:].any()


def test_what_has_one_length_is_written_in_place_with_the_clips_own_length() -> None:
    pipeline = PipelineFile(input="sound", output="x", length="frames", audio=WHISPER)
    x, lengths = np.full((2, 80, 3000), np.nan, np.float32), np.full(2, -1, np.int64)
    places = {"x": memoryview(x).cast("B"), "frames": memoryview(lengths).cast("B")}
    for index, seconds in enumerate((3.3, 0.5)):
        write_item(pipeline, wav(speech_like(seconds)), index, 2, places)
    assert lengths.tolist() == [330, 50]
    np.testing.assert_array_equal(x[0], read_clip(wav(speech_like(3.3)), WHISPER).values)


def test_what_is_longer_than_the_model_takes_is_refused() -> None:
    pipeline = PIPELINE.model_copy(update={"longest": 200})
    assert read_item(pipeline, wav(speech_like(2.0))).length == 200
    with pytest.raises(BadInputError, match=r"330 frames \(3\.3 s\); at most 200 frames \(2 s\) are taken"):
        read_item(pipeline, wav(speech_like(3.3)))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": ("FP32", (80, -1))}, "preprocess.output is 'x' and 'frames', but the model's inputs are x"),
        ({"x": ("FP32", (80, 300)), "frames": ("INT64", ())}, r"makes FP32 \[80, -1\], input x is FP32 \[80, 300\]"),
        ({"x": ("FP32", (64, -1)), "frames": ("INT64", ())}, r"input x is FP32 \[64, -1\]"),
        ({"x": ("FP32", (80, -1)), "frames": ("INT32", ())}, r"makes INT64 \[\], input frames is INT32"),
    ],
)
def test_a_pipeline_that_does_not_fit(inputs: dict[str, Any], message: str) -> None:
    checked(PIPELINE, {"x": ("FP32", (80, -1)), "frames": ("INT64", ())})
    checked(PIPELINE, {"x": ("FP32", (-1, -1)), "frames": ("INT64", (1,))})
    with pytest.raises(PipelineError, match=message):
        checked(PIPELINE, inputs)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": 600}, "window 600 is longer than fft 512"),
        ({"low_hz": 9000}, "is not within 0 to half the sample_rate"),
        ({"high_hz": 9000}, "is not within 0 to half the sample_rate"),
        ({"max_seconds": 0.0001}, "leave no clip that is long enough"),
        ({"preset": "nemo"}, "Input should be 'nemo-80' or 'whisper'"),
        ({"mel": 80}, "Extra inputs are not permitted"),
    ],
)
def test_steps_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        AudioSteps.model_validate(given)
    assert message in str(refused.value)


def test_an_extensible_header_says_what_its_samples_are_later() -> None:
    described = struct.pack("<HHIIHHHHIH", 0xFFFE, 1, RATE, 2 * RATE, 2, 16, 22, 16, 4, 1) + bytes(14)
    body = GOOD[44:]
    data = b"RIFF" + bytes(4) + b"WAVEfmt " + struct.pack("<I", 40) + described
    data += b"data" + struct.pack("<I", len(body)) + body
    np.testing.assert_array_equal(read_clip(data, NEMO).values, read_clip(GOOD, NEMO).values)
