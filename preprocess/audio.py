"""Sound into log-mel features. The same functions on every device.

In float64: the energy of a quiet band beside a loud one is lost in the rounding of a float32 transform, which makes
differences of 1e-3 between libraries. It costs no more here than torch.stft in float32.

Slaney's mel scale and filters: Slaney, Auditory Toolbox (1998), as librosa.filters.mel has them by default.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch.nn import functional

from preprocess.steps import AudioSteps

# Slaney's scale: linear below 1 kHz, then 27 steps for each factor of 6.4.
LINEAR_HZ = 200 / 3
BREAK_HZ = 1000.0
BREAK_MEL = BREAK_HZ / LINEAR_HZ
LOG_STEP = math.log(6.4) / 27
# NeMo: added to an energy before its logarithm, and to a deviation before dividing by it.
LOG_GUARD = 2.0**-24
DEVIATION_GUARD = 1e-5
# Frames transformed at a time, for the cache's sake.
BLOCK = 256


def log_mel(samples: torch.Tensor, steps: AudioSteps) -> torch.Tensor:
    """A mono clip, [samples], as float64 [mels, frames]."""
    frames = steps.frames_of(len(samples))
    padded = _padded(samples.to(torch.float64), steps)
    windows = padded.unfold(0, steps.fft, steps.hop)[:frames]
    energy = torch.cat([_energy(windows[at : at + BLOCK], steps) for at in range(0, frames, BLOCK)])
    return normalise(_logarithm(energy, steps), steps).T


def _padded(samples: torch.Tensor, steps: AudioSteps) -> torch.Tensor:
    """With silence up to the length that is fixed, pre-emphasised, and with half a window beyond both ends."""
    if steps.seconds is not None:
        samples = functional.pad(samples, (0, steps.most_samples - len(samples)))
    if steps.preemphasis:
        samples = torch.cat((samples[:1], samples[1:] - steps.preemphasis * samples[:-1]))
    half = steps.fft // 2
    padded: torch.Tensor = functional.pad(samples[None], (half, half), steps.pad)
    return padded[0]


def _energy(windows: torch.Tensor, steps: AudioSteps) -> torch.Tensor:
    spectrum = torch.fft.rfft(windows * _window(steps, windows.device))
    energy: torch.Tensor = spectrum.real.square() + spectrum.imag.square()
    return energy @ _filters(steps, windows.device)


def _logarithm(energy: torch.Tensor, steps: AudioSteps) -> torch.Tensor:
    if steps.log == "ln":
        return energy.add_(LOG_GUARD).log_()
    return energy.clamp_(min=1e-10).log10_()


def normalise(features: torch.Tensor, steps: AudioSteps) -> torch.Tensor:
    """What takes the whole clip: [frames, mels] against its own mean and deviation, or its maximum."""
    if steps.log == "whisper":
        features = torch.maximum(features, features.max() - 8.0).add_(4.0).div_(4.0)
    if steps.per_feature:
        deviation, mean = torch.std_mean(features, 0)
        features = features.sub_(mean).div_(deviation.add_(DEVIATION_GUARD))
    return features


@lru_cache(maxsize=32)
def _window(steps: AudioSteps, device: torch.device) -> torch.Tensor:
    """Hann's, in the middle of `fft` samples."""
    window = torch.hann_window(steps.window, periodic=steps.periodic, dtype=torch.float64)
    left = (steps.fft - steps.window) // 2
    return functional.pad(window, (left, steps.fft - steps.window - left)).to(device)


@lru_cache(maxsize=32)
def _filters(steps: AudioSteps, device: torch.device) -> torch.Tensor:
    """[fft // 2 + 1, mels]: triangles on Slaney's scale, each of area 1."""
    ends = torch.linspace(_mel(steps.low_hz), _mel(steps.highest_hz), steps.mels + 2, dtype=torch.float64)
    edges = torch.tensor([_hz(float(mel)) for mel in ends], dtype=torch.float64)
    bins = torch.linspace(0, steps.sample_rate / 2, steps.fft // 2 + 1, dtype=torch.float64)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return (torch.minimum(rising, falling).clamp_(min=0) * 2 / (high - low)).to(device)


def _mel(hz: float) -> float:
    return hz / LINEAR_HZ if hz < BREAK_HZ else BREAK_MEL + math.log(hz / BREAK_HZ) / LOG_STEP


def _hz(mel: float) -> float:
    return mel * LINEAR_HZ if mel < BREAK_MEL else BREAK_HZ * math.exp((mel - BREAK_MEL) * LOG_STEP)
