"""The demo models, made in seconds: real ones through torch.export, and an emulated one on measured timing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress

# A picture of a digit shown to people; the model's own pixels are 8 x 8.
PICTURE_SCALE = 16
MAX_BATCH = 64
# Made by name only: they take longer to make, load or measure.
MORE = ("photo", "tones", "sentences")


def make_models(out: Path, more: Sequence[str] = ()) -> int:
    """Makes what is not there yet, and `more` of them by name. A model appears whole or not at all.

    Returns 1 if one could not be made, which is said.
    """
    makers: dict[str, Callable[[Path], str]] = {
        "affine": _make_affine,
        "mlp": _make_mlp,
        "digits": _make_digits,
        "resnet50": _make_resnet50,
    }
    console = Console()
    for name in more:
        if name not in MORE and name not in makers:
            console.print(f"there is no demo model {name}; more there are: {', '.join(MORE)}", highlight=False)
            return 1
        makers.setdefault(name, partial(_make_one_of_more, name))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        console.print(f"cannot make the folder {out}: {error.strerror}", highlight=False, soft_wrap=True)
        return 1
    missing = {name: make for name, make in makers.items() if not (out / name).exists()}
    failed = False
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("making models", total=len(missing))
        for name, make in missing.items():
            bar.update(task, description=f"making {name}")
            try:
                told = f"{out / name}: {_make(out, name, make)}"
            except RuntimeError as error:
                told, failed = f"{name} was not made: {error}", True
            bar.console.print(told, highlight=False, soft_wrap=True)
            bar.advance(task)
    if not missing:
        console.print(f"{out}: {', '.join(makers)} are there", highlight=False, soft_wrap=True)
    return int(failed)


def _make(out: Path, name: str, make: Callable[[Path], str]) -> str:
    with tempfile.TemporaryDirectory(dir=out, prefix=".making-") as folder:
        Path(folder).chmod(0o755)  # a temporary folder is for its owner alone
        told = make(Path(folder))
        shutil.copytree(folder, out / name)
    return told


def _make_one_of_more(name: str, folder: Path) -> str:
    made: str = import_module(f"server.demo_{name}").make(folder)
    return made


def digits_split() -> tuple[np.ndarray[Any, Any], ...]:
    """scikit-learn's 1797 handwritten digits: images and labels for training, then those held out (a third).

    Images are FP32 [n, 1, 8, 8] in 0..1, on the 256 grey levels that a PNG has.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    levels = np.round(data.images * (255 / 16)).astype(np.uint8)
    images = (levels.astype(np.float32) / np.float32(255))[:, None]
    labels = data.target.astype(np.int64)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=1 / 3, random_state=0, stratify=labels
    )
    return train_x, train_y, test_x, test_y


def picture_of(image: np.ndarray[Any, Any]) -> Image.Image:
    """One digit of `digits_split` as a grey picture; made small again by area, it has the same pixels."""
    levels = np.round(image.reshape(8, 8) * 255).astype(np.uint8)
    return Image.fromarray(np.kron(levels, np.ones((PICTURE_SCALE, PICTURE_SCALE), np.uint8)))


def _export(model: Any, example: Any, folder: Path) -> None:
    import torch

    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    program = torch.export.export(model.eval(), (example,), dynamic_shapes=({0: batch},))
    (folder / "1").mkdir()
    torch.export.save(program, folder / "1" / "model.pt2")


def _make_affine(folder: Path) -> str:
    """y = 2 x + 1 on 16 floats, in one operation: what a request costs without a model."""
    import torch

    class Affine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.full((16,), 2.0))
            self.shift = torch.nn.Parameter(torch.ones(16))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": torch.addcmul(self.shift, self.scale, x)}

    _export(Affine(), torch.zeros(2, 16), folder)
    return "16 floats in, 16 floats out: y = 2 x + 1"


def _make_mlp(folder: Path) -> str:
    import torch
    from torch import nn

    torch.manual_seed(0)

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
            )

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.layers(x)}

    _export(Mlp(), torch.zeros(2, 256), folder)
    return "256 -> 1024 -> 1024 -> 10, seeded weights"


def _make_digits(folder: Path) -> str:
    import torch
    from torch import nn

    torch.set_num_threads(1)  # so small a network gains nothing from more, and loses much where cores are shared
    train_x, train_y, test_x, test_y = digits_split()
    torch.manual_seed(0)

    class Digits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(1, 32, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(32, 64, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Dropout(0.3),
                nn.Linear(64 * 4 * 4, 10),
            )

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            scores = self.layers(x).softmax(1)
            return {"label": scores.argmax(1), "scores": scores}

    model = Digits()
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    inputs, labels = torch.from_numpy(train_x), torch.from_numpy(train_y)
    for _ in range(25):
        for chosen in torch.split(torch.randperm(len(inputs)), 64):
            loss = nn.functional.cross_entropy(model.layers(inputs[chosen]), labels[chosen])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
    model.eval()
    with torch.inference_mode():
        predicted = model(torch.from_numpy(test_x))["label"].numpy()
    right = float((predicted == test_y).mean())
    if right < 0.97:
        raise RuntimeError(f"the digits model got only {right:.1%} of the held-out digits right, expected 97 %")
    _export(model, torch.zeros(2, 1, 8, 8), folder)
    (folder / "serving.yaml").write_text(
        "# Clients may send a picture, as the BYTES input `image`, instead of the tensor `x`.\n"
        "preprocess:\n  input: image\n  output: x\n  image: {mode: L, size: [8, 8], interpolation: area}\n"
    )
    three = next(index for index in range(len(test_y)) if test_y[index] == predicted[index] == 3)
    picture_of(test_x[three]).save(folder / "three.png")
    return f"a small CNN, {right:.1%} of {len(test_y)} held-out digits right"


def _make_resnet50(folder: Path) -> str:
    (folder / "1").mkdir()
    (folder / "config.pbtxt").write_text(
        'backend: "emulated"\nmax_batch_size: 32\n'
        'input { name: "image" data_type: TYPE_FP32 dims: [3, 224, 224] }\n'
        'output { name: "scores" data_type: TYPE_FP32 dims: [1000] }\n'
    )
    (folder / "serving.yaml").write_text(
        "# Answers a fixed function of its input, after the time measured on slices of an A100-80GB.\n"
        "latency_table: {measured: a100, model: resnet50}\n"
    )
    return "emulated, with the latencies of a ResNet-50 on slices of an A100-80GB"
