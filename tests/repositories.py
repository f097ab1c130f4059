"""Models that tests make for themselves."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from tests.harness import MODELS

STUCK, RAISES = 13.0, 99.0


def some_of_the_demo(root: Path, *names: str) -> Path:
    """A repository with these demo models only: each worker loads each model, at a quarter of a second."""
    for name in names:
        (root / name).symlink_to(MODELS / name, target_is_directory=True)
    return root


def emulated(folder: Path, milliseconds: float, items: int = 16, max_batch: int = 8, serving: str = "") -> Path:
    """A model that answers x.sum() after `milliseconds` a batch, whatever the slice."""
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(
        f'backend: "emulated" max_batch_size: {max_batch} '
        f'input {{ name: "x" data_type: TYPE_FP32 dims: [{items}] }} '
        'output { name: "y" data_type: TYPE_FP32 dims: [1] }'
    )
    rows = "\n".join(f"{folder.name},1g.10gb,{batch},{milliseconds}" for batch in (1, max_batch))
    (folder / "table.csv").write_text(f"model,mig_profile,batch,latency_ms\n{rows}\n")
    (folder / "serving.yaml").write_text(f"latency_table: {{file: table.csv}}\n{serving}")
    return folder


class Picky(torch.nn.Module):
    """y = 2 x; an item of 13 never comes to an end, one of 99 raises."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x == 99.0).any()):
            raise IndexError("no such item")
        while bool((x == 13.0).any()):
            x = x * 1.0
        return x * 2.0


def picky(folder: Path) -> Path:
    """A TorchScript model that hangs on 13 and raises on 99."""
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(
        'max_batch_size: 8 input { name: "x" data_type: TYPE_FP32 dims: [1] } '
        'output { name: "y" data_type: TYPE_FP32 dims: [1] }'
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Picky()).save(str(folder / "1" / "model.pt"))
    # Known latencies: nothing is measured, so that a worker is back in no time.
    (folder / "table.csv").write_text(f"model,mig_profile,batch,latency_ms\n{folder.name},1g.10gb,1,0.1\n")
    (folder / "serving.yaml").write_text("latency_table: {file: table.csv}\n")
    return folder


class Endless(torch.nn.Module):
    """Does not come to an end on zeros, which is what it is measured with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while bool((x == 0.0).any()):
            x = x * 1.0
        return x


def endless(folder: Path) -> Path:
    """A TorchScript model that no worker ever has loaded."""
    picky(folder)
    (folder / "serving.yaml").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Endless()).save(str(folder / "1" / "model.pt"))
    return folder


class Masked(torch.nn.Module):
    """The mean of an item's own values, and each of them twice; what is behind its end must not count."""

    def __init__(self, told: bool) -> None:
        super().__init__()
        self._told = told

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> dict[str, torch.Tensor]:
        there = torch.arange(x.shape[1])[None] < n[:, None] if self._told else x == x
        return {"mean": (x * there).sum(1, keepdim=True) / there.sum(1, keepdim=True), "twice": 2 * x}


class Counted(torch.nn.Module):
    """How many values of an item are not above zero, what is behind its end included."""

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"count": (x <= 0).sum(1, keepdim=True) + 0 * n[:, None]}


def masked(folder: Path, lengths: str, *, told: bool = True, model: torch.nn.Module | None = None) -> Path:
    """Values of a length from 2 to 64. `told`: the model heeds its input `n`. `lengths`: for serving.yaml."""
    (folder / "1").mkdir(parents=True)
    batch, length = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("length", min=2, max=64)
    example = torch.zeros(2, 5), torch.tensor([5, 4])
    program = torch.export.export(model or Masked(told), example, dynamic_shapes=({0: batch, 1: length}, {0: batch}))
    torch.export.save(program, folder / "1" / "model.pt2")
    (folder / "serving.yaml").write_text(f"lengths: {lengths}\n")
    return folder
