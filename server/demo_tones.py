"""The demo model `tones`: what is to be heard in clips of 1 to 25 s, learned in seconds from synthetic ones."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from preprocess.audio import log_mel
from preprocess.steps import AudioSteps

KINDS = ("tone", "chord", "sweep", "pulses", "noise")
RATE = 16_000
SHORTEST_S, LONGEST_S = 1.0, 25.0
STEPS = AudioSteps(preset="nemo-80", per_feature=False, max_seconds=30.0)
LONGEST_FRAMES = 3000
MAX_BATCH = 16
TRAINED_ON, HELD_OUT = 400, 100
CROP_FRAMES = 100
ROUNDS = 600
LEAST_RIGHT = 0.95

Clip = np.ndarray[Any, np.dtype[np.float32]]


def clip(kind: str, seconds: float, rng: np.random.Generator) -> Clip:
    """A clip within -1..1, with next to no noise or some behind what is to be heard."""
    t = np.arange(int(seconds * RATE)) / RATE
    low = rng.uniform(150, 1500)
    match kind:
        case "tone":
            sound = np.sin(2 * np.pi * low * t)
        case "chord":
            sound = np.mean([np.sin(2 * np.pi * low * ratio * t) for ratio in (1, 1.25, 1.5, 2.5)], axis=0)
        case "sweep":
            sound = np.sin(2 * np.pi * low * t + 400 * np.sin(2 * np.pi * rng.uniform(0.4, 0.8) * t))
        case "pulses":
            sound = np.sin(2 * np.pi * low * t) * (np.sin(2 * np.pi * rng.uniform(3, 6) * t) > 0)
        case _:
            sound = rng.standard_normal(len(t)) / 3
    made = rng.uniform(0.1, 0.8) * (sound + 10 ** rng.uniform(-5, -1.7) * rng.standard_normal(len(t)))
    return made.clip(-1, 1).astype(np.float32)


def clips(count: int, seed: int) -> list[tuple[Clip, int]]:
    """Clips and their kinds' numbers, lengths and kinds drawn evenly."""
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(np.arange(count) % len(KINDS))
    return [(clip(KINDS[kind], rng.uniform(SHORTEST_S, LONGEST_S), rng), int(kind)) for kind in kinds]


def wav(samples: Clip) -> bytes:
    """A WAV file of 16 bits."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


class Tones(nn.Module):
    """Features [n, 80, frames], of which `frames` are no padding, which is hidden from every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(80, 32, 5, padding=2)
        self.second = nn.Conv1d(32, 32, 5, padding=2)
        self.last = nn.Linear(64, len(KINDS))

    def scores(self, x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        mask = (torch.arange(x.shape[2], device=x.device)[None] < frames[:, None])[:, None].to(x.dtype)
        x = (x + 8) / 4 * mask
        x = torch.relu(self.first(x)) * mask
        x = torch.relu(self.second(x)) * mask
        mean = x.sum(2) / frames[:, None]
        made: torch.Tensor = self.last(torch.cat((mean, x.amax(2)), 1))
        return made

    def forward(self, x: torch.Tensor, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.scores(x, frames).softmax(1)
        return {"kind": scores.argmax(1), "scores": scores}


def make(folder: Path) -> str:
    """Trains and exports it, with its pipeline."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Tones()
    _train(model, [(_features(samples), kind) for samples, kind in clips(TRAINED_ON, seed=0)])
    model.eval()
    right = _right(model, clips(HELD_OUT, seed=1))
    if right < LEAST_RIGHT:
        raise RuntimeError(f"the tones model got only {right:.1%} of the held-out clips right, expected 95 %")
    batch, time = torch.export.Dim("batch", min=1, max=MAX_BATCH), torch.export.Dim("time", min=2, max=LONGEST_FRAMES)
    example = torch.zeros(2, 80, 200), torch.tensor([200, 100])
    shapes = {"x": {0: batch, 2: time}, "frames": {0: batch}}
    (folder / "1").mkdir()
    torch.export.save(torch.export.export(model, example, dynamic_shapes=shapes), folder / "1" / "model.pt2")
    (folder / "serving.yaml").write_text(
        "# Clients may send WAV, FLAC, Ogg or MP3, as the BYTES input `sound`, instead of features and their length.\n"
        f"preprocess:\n  input: sound\n  output: x\n  length: frames\n"
        "  audio: {preset: nemo-80, per_feature: false, max_seconds: 30}\n"
        "# Clips of different lengths share batches, filled up with zeros that `frames` tells from sound.\n"
        f"lengths: {{longest: {LONGEST_FRAMES}, buckets: 5}}\n"
        f"# The output `kind`: {', '.join(f'{number} {kind}' for number, kind in enumerate(KINDS))}.\n"
    )
    (folder / "sweep.wav").write_bytes(wav(clip("sweep", 3.0, np.random.default_rng(5))))
    return f"a small CNN, {right:.1%} of {HELD_OUT} held-out clips right"


def _features(samples: Clip) -> torch.Tensor:
    return log_mel(torch.from_numpy(samples), STEPS).float()


def _train(model: Tones, examples: list[tuple[torch.Tensor, int]]) -> None:
    """On pieces of a second out of each clip."""
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    rng = np.random.default_rng(2)
    frames = torch.full((32,), CROP_FRAMES)
    for _ in range(ROUNDS):
        chosen = [examples[index] for index in rng.integers(0, len(examples), 32)]
        begins = [int(rng.integers(0, features.shape[1] - CROP_FRAMES + 1)) for features, _ in chosen]
        pieces = [features[:, at : at + CROP_FRAMES] for (features, _), at in zip(chosen, begins, strict=True)]
        labels = torch.tensor([kind for _, kind in chosen])
        loss = nn.functional.cross_entropy(model.scores(torch.stack(pieces), frames), labels)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()


def _right(model: Tones, held_out: list[tuple[Clip, int]]) -> float:
    """Share of whole clips whose kind is told."""
    with torch.inference_mode():
        told = []
        for samples, kind in held_out:
            features = _features(samples)[None]
            told.append(int(model(features, torch.tensor([features.shape[2]]))["kind"]) == kind)
    return float(np.mean(told))
