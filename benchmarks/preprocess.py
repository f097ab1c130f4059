"""JPEG bytes to a float32 224 x 224 tensor: this server's way beside torchvision's on Pillow images, in one run.

    python -m benchmarks.preprocess             prints the table
    python -m benchmarks.preprocess --write     also keeps it, in benchmarks/results/preprocess.md

The ways take turns in windows of half a second. "A core" is processor time: images for each second that this process
computed, so that what else runs on the machine weighs little. Threads are compared by the clock, in windows that leave
the machine to this process: what others used of it, by /proc/stat, is printed; busier windows than --busy do not count.
Beside it stands what each did with a second of a core, in all windows: what is lost there is lost to each other.

Pillow's time for large pictures depends on glibc's allocator: it returns large blocks and faults them in again. The
column "Pillow, tuned" is the same in a process whose allocator keeps them.
"""

from __future__ import annotations

import asyncio
import io
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from preprocess.images import write_image
from preprocess.pipeline import PipelineFile
from preprocess.pool import PreprocessPool
from preprocess.steps import ImageSteps
from preprocess.work import CPU

RESULTS = Path(__file__).parent / "results" / "preprocess.md"
STEPS = ImageSteps(preset="imagenet-eval")
PIPELINE = PipelineFile(input="image", output="x", image=STEPS)
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
SIZES = {(640, 480): 88, (1920, 1080): 93}  # pixels -> JPEG quality, for about 100 and 500 kB
WINDOW_S = 0.5
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    "MALLOC_TOP_PAD_": "67108864",
}
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Window(NamedTuple):
    """`per_core_s`: images for a second of this process's processor time. `others`: cores that others used."""

    per_s: float
    per_core_s: float
    others: float


def photograph(width: int, height: int, quality: int) -> bytes:
    """A photograph of scikit-learn's, made as large."""
    from sklearn.datasets import load_sample_images

    buffer = io.BytesIO()
    Image.fromarray(load_sample_images().images[0]).resize((width, height), Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=quality
    )
    return buffer.getvalue()


def by_pillow(data: bytes) -> torch.Tensor:
    """What torchvision's Resize(256), CenterCrop(224), ToTensor, Normalize do with a Pillow image."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    short = min(width, height)
    size = (int(256 * width / short), int(256 * height / short))
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - 224) / 2.0), round((size[1] - 224) / 2.0)
    image = image.crop((left, top, left + 224, top + 224))
    pixels = torch.from_numpy(np.array(image, np.uint8, copy=True)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255).clone().sub_(MEAN).div_(STD)


def ours(data: bytes, target: torch.Tensor) -> None:
    write_image(data, STEPS, CPU, target)


def window(run: Callable[[], int]) -> Window:
    """One window of a run that says how many images it did."""
    before = time.perf_counter(), time.process_time(), _busy_s()
    images = run()
    wall, own, busy = (now - then for now, then in zip((*_clocks(), _busy_s()), before, strict=True))
    return Window(images / wall, images / own, max(0.0, (busy - own) / wall))


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _busy_s() -> float:
    """Processor time that the whole machine has used."""
    fields = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / TICKS_PER_S


def for_a_while(work: Callable[[], object]) -> int:
    end = time.perf_counter() + WINDOW_S
    images = 0
    while time.perf_counter() < end:
        work()
        images += 1
    return images


def through_pool(data: bytes, threads: int, isolated: bool = False) -> int:
    """Requests of one picture each through the pool of the daemon, some always waiting."""

    async def run() -> int:
        pool = PreprocessPool(threads, isolated=isolated)
        end = time.perf_counter() + WINDOW_S
        done = 0

        async def client() -> None:
            nonlocal done
            target = memoryview(bytearray(4 * STEPS.shape[0] * STEPS.shape[1] * STEPS.shape[2]))
            while time.perf_counter() < end:
                await pool.write(PIPELINE, [data], {"x": target}).future
                done += 1

        await asyncio.gather(*(client() for _ in range(3 * threads)))
        pool.close()
        return done

    return asyncio.run(run())


def tuned_pillow(size: tuple[int, int], rounds: int) -> float:
    """Images a core-second of the Pillow way, in a process with another allocator setting."""
    command = [sys.executable, "-m", "benchmarks.preprocess", "--only-pillow", f"{size[0]}x{size[1]}"]
    done = subprocess.run(
        [*command, "--rounds", str(rounds)], env=os.environ | TUNED, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def measure(size: tuple[int, int], rounds: int, busy: float) -> tuple[list[str], list[str]]:
    """A row of each table."""
    data = photograph(*size, SIZES[size])
    target = torch.empty(STEPS.shape)
    ways: dict[str, Callable[[], int]] = {
        "pillow": lambda: for_a_while(lambda: by_pillow(data)),
        "ours": lambda: for_a_while(lambda: ours(data, target)),
        "one": lambda: through_pool(data, 1),
        "two": lambda: through_pool(data, 2),
    }
    for run in ways.values():
        run()
    seen = {name: [window(run)] for name, run in ways.items()}
    for _ in range(rounds - 1):
        for name, run in ways.items():
            seen[name].append(window(run))
    core = {name: statistics.median(each.per_core_s for each in windows) for name, windows in seen.items()}
    quiet = [pair for pair in zip(seen["one"], seen["two"], strict=True) if max(each.others for each in pair) <= busy]
    tuned = tuned_pillow(size, max(3, rounds // 4))
    name = f"{size[0]} x {size[1]}, {len(data) // 1000} kB"
    gain, tuned_gain = core["ours"] / core["pillow"], core["ours"] / tuned
    first = [
        name,
        *(f"{each:.0f}" for each in (core["pillow"], tuned, core["ours"])),
        f"{gain:.2f}",
        f"{tuned_gain:.2f}",
    ]
    return first, [name, *_scaling(quiet), f"{len(quiet)} of {rounds}", f"{core['one']:.0f}", f"{core['two']:.0f}"]


def _scaling(quiet: list[tuple[Window, Window]]) -> list[str]:
    if not quiet:
        return ["-"] * 4
    one, two = (statistics.median(each.per_s for each in windows) for windows in zip(*quiet, strict=True))
    others = statistics.median(each.others for pair in quiet for each in pair)
    return [
        f"{one:.0f}",
        f"{two:.0f}",
        f"{statistics.median(b.per_s / a.per_s for a, b in quiet):.2f}",
        f"{others:.2f}",
    ]


def main(
    write: Annotated[bool, typer.Option("--write", help="Keep the tables.")] = False,
    rounds: Annotated[int, typer.Option(help="Windows of each way.")] = 15,
    busy: Annotated[float, typer.Option(help="Cores that others may use in a window that counts for threads.")] = 0.06,
    only_pillow: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measures, and prints the tables."""
    torch.set_num_threads(1)
    if only_pillow:
        width, height = map(int, only_pillow.split("x"))
        data = photograph(width, height, SIZES[width, height])
        windows = [window(lambda: for_a_while(lambda: by_pillow(data))) for _ in range(rounds)]
        print(statistics.median(each.per_core_s for each in windows))
        return
    core = Table(title="Images for a second of one core")
    for column in ("picture", "Pillow", "Pillow, tuned", "migserve", "gain", "gain on tuned"):
        core.add_column(column, justify="left" if column == "picture" else "right")
    threads = Table(title="Images a second through the pool")
    columns = ("1 thread", "2 threads", "ratio", "cores of others", "quiet windows", "a core-s: 1 thread", "2 threads")
    for column in ("picture", *columns):
        threads.add_column(column, justify="left" if column == "picture" else "right")
    for size in SIZES:
        first, second = measure(size, rounds, busy)
        core.add_row(*first)
        threads.add_row(*second)
    console = Console(record=True, width=120)
    console.print(f"{os.cpu_count()} cores, torch {torch.__version__}, Pillow {Image.__version__}")
    console.print(core)
    console.print(threads)
    if write:
        RESULTS.write_text(
            f"# Preprocessing pictures\n\n`python -m benchmarks.preprocess`\n\n```\n{console.export_text()}```\n"
        )


if __name__ == "__main__":
    typer.run(main)
