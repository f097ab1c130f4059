"""The demo model `photo`: a ResNet-50 as large and as slow as that for ImageNet, with seeded weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

MAX_BATCH = 8
# Of a block's last normalisation: small, so that sixteen blocks on random weights do not add up to infinity.
RESIDUAL_GAIN = 0.2


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 convolutions beside a shortcut (He et al. 2016, fig. 5), stride in the 3 x 3."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(channels, width, 1, 1),
            nn.ReLU(),
            *_convolution(width, width, 3, stride),
            nn.ReLU(),
            *_convolution(width, 4 * width, 1, 1),
        )
        same = stride == 1 and channels == 4 * width
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolution(channels, 4 * width, 1, stride))
        last = self.body[-1]
        assert isinstance(last, nn.BatchNorm2d)
        nn.init.constant_(last.weight, RESIDUAL_GAIN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class Photo(nn.Module):
    """[n, 3, 224, 224] -> scores of 1000 classes."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        channels = 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            width = 64 << stage
            for block in range(blocks):
                layers.append(Bottleneck(channels, width, 2 if stage and not block else 1))
                channels = 4 * width
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.layers(x).softmax(1)}


def _convolution(channels: int, made: int, size: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, made, size, stride, size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return [convolution, nn.BatchNorm2d(made)]


def make(folder: Path) -> str:
    """Exports it, with its pipeline."""
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    program = torch.export.export(Photo().eval(), (torch.zeros(2, 3, 224, 224),), dynamic_shapes=({0: batch},))
    (folder / "1").mkdir()
    torch.export.save(program, folder / "1" / "model.pt2")
    (folder / "serving.yaml").write_text(
        "# Clients may send a picture, as the BYTES input `image`, instead of the tensor `x`.\n"
        "preprocess:\n  input: image\n  output: x\n  image: {preset: imagenet-eval}\n"
    )
    return "a ResNet-50 with seeded weights: for its speed, not its answers"
