"""Encoded clips into a model's features: gate, decode, mix, resample, log-mel."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from preprocess import sound
from preprocess.audio import log_mel
from preprocess.steps import AudioSteps

NUMPY: dict[str, Any] = {"FP32": np.float32, "FP16": np.float16}


class Clip(NamedTuple):
    """`features`: [mels, frames] in the steps' dtype. `length`: as many frames are of the clip, the rest is silence."""

    features: np.ndarray[Any, Any]
    length: int


def read_clip(data: bytes, steps: AudioSteps) -> Clip:
    """Raises BadInputError."""
    samples = sound.decode(data, steps.sample_rate, steps.least_samples, steps.most_samples)
    features = log_mel(torch.from_numpy(samples), steps).numpy().astype(NUMPY[steps.dtype])
    return Clip(features, len(samples) // steps.hop)
