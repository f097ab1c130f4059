"""Encoded clips into a model's features: gate, decode, mix, resample, log-mel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from preprocess import sound
from preprocess.audio import log_mel
from preprocess.items import Item
from preprocess.stages import stage
from preprocess.steps import AudioSteps

NUMPY: dict[str, Any] = {"FP32": np.float32, "FP16": np.float16}


def read_clip(data: bytes, steps: AudioSteps) -> Item:
    """[mels, frames]; its length is the clip's, where silence was added. Raises BadInputError."""
    with stage("decode"):
        samples = sound.decode(data, steps.sample_rate, steps.least_samples, steps.most_samples)
    with stage("transform"):
        features = log_mel(torch.from_numpy(samples), steps).numpy().astype(NUMPY[steps.dtype])
    return Item(features, len(samples) // steps.hop)
