"""What the CUDA worker gains by staging a batch while another runs, what it takes of memory, and how long a batch takes
on shares of the GPU's SMs. Needs a GPU.

.venv/bin/python -m benchmarks.gpu_worker            prints the table
.venv/bin/python -m benchmarks.gpu_worker --write    also keeps it, in benchmarks/results/gpu_worker.md
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from scheduler.channel import ModelSource
from tests.harness import MODELS

RESULTS = Path(__file__).parent / "results" / "gpu_worker.md"
BATCHES = 200
SHARE_BATCHES = 20
ROUNDS = 7


def rate(model: Any, parts: list[memoryview], shape: tuple[int, ...], depth: int) -> float:
    """Items a second with up to `depth` batches under way: gathered, copied in, computed, copied out."""
    under_way: list[Any] = []
    begin = time.perf_counter()
    for _ in range(BATCHES):
        under_way.append(model.start([model.join(parts, shape, np.dtype("float32"))]))
        if len(under_way) == depth:
            model.finish(under_way.pop(0))
    for started in under_way:
        model.finish(started)
    return BATCHES * shape[0] / (time.perf_counter() - begin)


def heavy_model(folder: Path) -> Path:
    """Eight matrices of 4096 x 4096, one after the other: a batch of 64 items keeps any number of SMs busy."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096, bias=False) for _ in range(8))).eval()
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(layers, (torch.zeros(2, 4096),), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "model.pt2")
    return folder / "model.pt2"


def milliseconds_by_sms(source: ModelSource, batch: int, counts: Sequence[int]) -> list[float]:
    """Of a batch, on shares of so many SMs, in turns; the copies included."""
    from scheduler.backends.cuda import CudaBackend

    models = [CudaBackend(source, count) for count in counts]
    shape = (batch, *models[0].signature.inputs[0].dims)
    parts = [memoryview(np.ones(shape, np.float32)).cast("B")]
    found: list[list[float]] = [[] for _ in counts]
    for _ in range(ROUNDS + 1):
        for model, seen in zip(models, found, strict=True):
            inputs = [model.join(parts, shape, np.dtype("float32"))]
            begin = time.perf_counter()
            for _ in range(SHARE_BATCHES):
                model.finish(model.start(inputs))
            seen.append(1e3 * (time.perf_counter() - begin) / SHARE_BATCHES)
    return [statistics.median(seen[1:]) for seen in found]


def by_sms() -> Table:
    """How far a share of the SMs is a slice, and what copies and launches take in any case."""
    total = torch.cuda.get_device_properties(0).multi_processor_count
    counts = [count for count in (8, 16, 32, 64, 96) if count < total] + [total]
    table = Table(title="ms of a batch through eight 4096 x 4096 layers")
    table.add_column("batch", justify="right")
    for count in counts:
        table.add_column(f"{count} SMs", justify="right")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        source = ModelSource("k", "heavy", 1, "torch_export", str(heavy_model(Path(folder))))
        for batch in (1, 64, 512):
            table.add_row(str(batch), *(f"{ms:.2f}" for ms in milliseconds_by_sms(source, batch, counts)))
    return table


def main(write: Annotated[bool, typer.Option("--write", help="Keep the table.")] = False) -> None:
    """Measures, and prints the table."""
    if not torch.cuda.is_available():
        raise SystemExit("this needs a GPU, and torch in its CUDA build")
    from scheduler.backends.cuda import CudaBackend

    table = Table(title="Items/s of one worker: one batch at a time, and one running with one staged")
    for column in ("model", "batch", "one at a time", "with one staged", "gain"):
        table.add_column(column, justify="left" if column == "model" else "right")
    with torch.inference_mode():
        for name in track(("affine", "mlp", "digits"), description="measuring"):
            model = CudaBackend(ModelSource("k", name, 1, "torch_export", str(MODELS / name / "1" / "model.pt2")))
            for batch in (1, 8, 64):
                shape = (batch, *model.signature.inputs[0].dims)
                parts = [memoryview(np.ones(shape[1:], np.float32).tobytes())] * batch
                rate(model, parts, shape, 2)
                pairs = [(rate(model, parts, shape, 1), rate(model, parts, shape, 2)) for _ in range(ROUNDS)]
                alone, staged = (statistics.median(column) for column in zip(*pairs, strict=True))
                gain = statistics.median(b / a for a, b in pairs)
                table.add_row(name, str(batch), f"{alone:,.0f}", f"{staged:,.0f}", f"{gain:.2f}")
    console = Console(record=True, width=120)
    device = torch.cuda.get_device_properties(0)
    console.print(
        f"{device.name}, {device.multi_processor_count} SMs, torch {torch.__version__}, CUDA {torch.version.cuda}"
    )
    console.print(table)
    console.print(by_sms())
    reserved, free = torch.cuda.memory_reserved() / 2**20, torch.cuda.mem_get_info()
    console.print(
        f"Device memory: {reserved:.0f} MiB in torch's pool, {(free[1] - free[0]) / 2**20:.0f} MiB in use in all"
    )
    if write:
        RESULTS.write_text(
            f"# The CUDA worker\n\n`python -m benchmarks.gpu_worker`\n\n```\n{console.export_text()}```\n"
        )


if __name__ == "__main__":
    typer.run(main)
