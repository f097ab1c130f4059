"""JPEG bytes to a float32 224 x 224 tensor: this server's way beside torchvision's on Pillow images, in one run.

    python -m benchmarks.preprocess             prints the table
    python -m benchmarks.preprocess --write     also keeps it, in benchmarks/results/preprocess.md

The ways take turns in windows of half a second. "A core" is processor time: images for each second that this process
computed, so that what else runs on the machine weighs little. Two threads, and two processes, are compared with one by
the clock, from which the time is taken that they were ready and waited for a core (schedstat): what others take, they
would have. Beside it the ratio in quiet windows, with how many there were (--busy), the cores that others used, and
what each did with a second of a core: what two lose there is lost to each other.

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
KINDS = ("threads", "processes")
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
    alone_per_s: float = 0.0


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


class Pooled:
    """The daemon's pool, with requests of one picture each always waiting, in windows. `isolated`: in processes."""

    def __init__(self, data: bytes, threads: int, *, isolated: bool) -> None:
        self._data = data
        self._threads = threads
        self._runner = asyncio.Runner()
        self._pool = PreprocessPool(threads, isolated=isolated)
        self._runner.run(self._pool.prepare(PIPELINE))
        self._isolated = isolated

    def close(self) -> None:
        self._pool.close()
        self._runner.close()

    def window(self) -> Window:
        """`alone_per_s`: the time that its threads, or processes, were ready and waited for a core is taken out."""
        before, begin = self._tasks(), time.perf_counter()
        own, busy = time.process_time(), _busy_s()
        images = self._runner.run(self._work(begin + WINDOW_S))
        wall, after = time.perf_counter() - begin, self._tasks()
        own, busy = time.process_time() - own, _busy_s() - busy
        used = sorted(
            (cpu - before.get(task, (0, 0))[0], queued - before.get(task, (0, 0))[1])
            for task, (cpu, queued) in after.items()
        )[-self._threads :]
        core_s = own + (sum(cpu for cpu, _ in used) / 1e9 if self._isolated else 0.0)
        queued_s = sum(queued for _, queued in used) / len(used) / 1e9
        return Window(images / wall, images / core_s, max(0.0, (busy - core_s) / wall), images / (wall - queued_s))

    async def _work(self, end: float) -> int:
        done = 0

        async def client() -> None:
            nonlocal done
            target = memoryview(bytearray(4 * STEPS.shape[0] * STEPS.shape[1] * STEPS.shape[2]))
            while time.perf_counter() < end:
                await self._pool.write(PIPELINE, [self._data], {"x": target}).future
                done += 1

        await asyncio.gather(*(client() for _ in range(3 * self._threads)))
        return done

    def _tasks(self) -> dict[str, tuple[int, int]]:
        """ns on a core and ns ready but waiting for one, of each thread that may decode (/proc/.../schedstat)."""
        found = {}
        for pid in self._pool.pids() if self._isolated else [os.getpid()]:
            for task in Path(f"/proc/{pid}/task").iterdir():
                cpu, queued, _ = (task / "schedstat").read_text().split()
                found[str(task)] = int(cpu), int(queued)
        return found


def tuned_pillow(size: tuple[int, int], rounds: int) -> float:
    """Images a core-second of the Pillow way, in a process with another allocator setting."""
    command = [sys.executable, "-m", "benchmarks.preprocess", "--only-pillow", f"{size[0]}x{size[1]}"]
    done = subprocess.run(
        [*command, "--rounds", str(rounds)], env=os.environ | TUNED, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def measure(size: tuple[int, int], rounds: int, busy: float) -> tuple[list[str], list[list[str]]]:
    """A row of the one table, and those of the other."""
    data = photograph(*size, SIZES[size])
    target = torch.empty(STEPS.shape)
    pools = {
        f"{number} {kind}": Pooled(data, number, isolated=kind == "processes") for kind in KINDS for number in (1, 2)
    }
    ways: dict[str, Callable[[], Window]] = {
        "pillow": lambda: window(lambda: for_a_while(lambda: by_pillow(data))),
        "ours": lambda: window(lambda: for_a_while(lambda: ours(data, target))),
        **{name: pooled.window for name, pooled in pools.items()},
    }
    for run in ways.values():
        run()
    seen: dict[str, list[Window]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            seen[name].append(run())
    for pooled in pools.values():
        pooled.close()
    core = {name: statistics.median(each.per_core_s for each in windows) for name, windows in seen.items()}
    tuned = tuned_pillow(size, max(3, rounds // 4))
    name = f"{size[0]} x {size[1]}, {len(data) // 1000} kB"
    gain, tuned_gain = core["ours"] / core["pillow"], core["ours"] / tuned
    first = [
        name,
        *(f"{each:.0f}" for each in (core["pillow"], tuned, core["ours"])),
        f"{gain:.2f}",
        f"{tuned_gain:.2f}",
    ]
    return first, [[name, kind, *_scaling(seen, kind, busy)] for kind in KINDS]


def _scaling(seen: dict[str, list[Window]], kind: str, busy: float) -> list[str]:
    """Of windows one after the other: as it was measured, where others left the machine alone, and as if they had."""
    pairs = list(zip(seen[f"1 {kind}"], seen[f"2 {kind}"], strict=True))
    quiet = [two.per_s / one.per_s for one, two in pairs if max(one.others, two.others) <= busy]
    one, two = (statistics.median(each.alone_per_s for each in windows) for windows in zip(*pairs, strict=True))
    efficient = [statistics.median(each.per_core_s for each in windows) for windows in zip(*pairs, strict=True)]
    return [
        f"{one:.0f}",
        f"{two:.0f}",
        f"{statistics.median(b.alone_per_s / a.alone_per_s for a, b in pairs):.2f}",
        f"{statistics.median(quiet):.2f} ({len(quiet)})" if quiet else "-",
        f"{statistics.median(each.others for pair in pairs for each in pair):.2f}",
        *(f"{each:.0f}" for each in efficient),
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
    columns = ("one", "two", "ratio", "ratio, quiet", "others", "a core-s: one", "two")
    for column in ("picture", "of", *columns):
        threads.add_column(column, justify="left" if column in ("picture", "of") else "right")
    for size in SIZES:
        first, second = measure(size, rounds, busy)
        core.add_row(*first)
        for row in second:
            threads.add_row(*row)
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
