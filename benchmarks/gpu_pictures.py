"""Preprocessing on an NVIDIA GPU: does it agree with the CPU, is it safe, and what does it gain? Needs a GPU.

    make bench-gpu                      prints what it finds, and writes build/bench-gpu.json and build/bench-gpu.svg
    make bench-gpu ARGS="--write"       writes them to benchmarks/results/ instead

Without a GPU, or without nvImageCodec, it says "not measured", in the files too, and measures nothing.

    agreement   the 224 x 224 levels of two photographs at ten sizes: at most 12 levels from the CPU's, 0.6 in the mean
    sentinel    pictures that are said to be decoded and were never written: those that the guard caught, by its marks
    race        a long kernel, then memory that it writes to is freed and decoded into: pictures that it spoiled (there
                may be none: the guard synchronises first). Published: 134 of 200 with another wrapper, on an H100
    pool        pictures a second of the preprocessing pool by itself, on the CPU and on the GPU
    served      pictures a second of the model `photo` on the GPU over HTTP: preprocessed by the CPU, by the GPU, and by
                the client (ready tensors, which stands for free preprocessing), and each one's share of that
"""

from __future__ import annotations

import asyncio
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console

from benchmarks.preba import by_pool, capacity
from benchmarks.preprocess import PIPELINE, SIZES, photograph
from preprocess.devices import NVIMAGECODEC, Target
from preprocess.images import write_image
from preprocess.pool import PreprocessPool
from preprocess.steps import ImageSteps
from preprocess.work import CPU
from tests.harness import REPOSITORY, running
from tests.preprocess.pictures import encoded, photographs, prepared

RESULTS = Path(__file__).parent / "results"
KEPT = REPOSITORY / "build"
EXAMPLES = REPOSITORY / "build" / "example-models"
# Limits of the design: to be tightened once they were measured.
MEAN_LEVELS, MOST_LEVELS = 0.6, 12
SIDES = (
    *((640, 480), (640, 427), (427, 640), (1920, 1080), (800, 600)),
    *((333, 500), (1001, 701), (256, 256), (224, 300), (2400, 1600)),
)
TRIES = 200
SECONDS, CONNECTIONS = 8.0, 64

Found = dict[str, Any]


def files() -> list[bytes]:
    return [
        encoded(picture.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=90)
        for picture in photographs()
        for size in SIDES
    ]


def agreement(card: Any) -> Found:
    from preprocess.cards import Guarded

    steps = ImageSteps.model_validate({"resize": 256, "crop": 224, "dtype": "UINT8"})
    decoder = Guarded(card)
    most, means = 0, []
    for data in files():
        by_gpu = torch.empty(steps.shape, dtype=torch.uint8)
        write_image(data, steps, decoder, by_gpu)
        apart = (by_gpu.int() - prepared(data, steps).int()).abs()
        most, means = max(most, int(apart.max())), [*means, float(apart.float().mean())]
    passed = most <= MOST_LEVELS and max(means) <= MEAN_LEVELS
    return {"pictures": len(means), "most_levels": most, "mean_levels": max(means), "passed": passed}


def sentinel(card: Any) -> Found:
    from preprocess.cards import is_marked, mark, shape_of
    from preprocess.decoders import Picture
    from preprocess.gate import inspect

    pictures = [Picture(data, inspect(data, 50_000_000)) for data in files()]
    skipped = failed = 0
    for _ in range(TRIES // len(pictures)):
        for picture in pictures:
            place = torch.empty(shape_of(picture), dtype=torch.uint8, device=card.device)
            mark(place)
            card.synchronise()
            (error,) = card.decode_into([picture], [place])
            failed += error is not None
            skipped += error is None and is_marked(place)
    tried = TRIES // len(pictures) * len(pictures)
    return {"tried": tried, "not_decoded_by_the_gpu": failed, "unnoticed": skipped, "passed": not skipped}


def race(card: Any) -> Found:
    from preprocess.cards import Guarded
    from preprocess.decoders import Picture
    from preprocess.gate import inspect

    data = photograph(640, 480, SIZES[640, 480])
    picture = Picture(data, inspect(data, 50_000_000))
    decoder, spoiled = Guarded(card), 0
    (expected,) = decoder.decode([picture])
    assert isinstance(expected, torch.Tensor)
    factor = torch.randn(2048, 2048, device=card.device) / 64
    for _ in range(TRIES):
        product = factor
        recycled = torch.empty(480 * 640 * 3, dtype=torch.uint8, device=card.device)
        for _ in range(20):
            product = product @ factor
        recycled.fill_(7)  # behind all that, on the same stream
        del recycled
        (decoded,) = decoder.decode([picture])
        torch.cuda.synchronize()
        spoiled += not (isinstance(decoded, torch.Tensor) and torch.equal(decoded, expected))
    return {"tried": TRIES, "spoiled": spoiled, "passed": not spoiled}


def pool(card: Any) -> Found:
    data, found = photograph(640, 480, SIZES[640, 480]), {}
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    for name, target in (("cpu", Target()), ("gpu", Target(NVIMAGECODEC, (uuid,)))):
        found[f"{name}_per_s"] = asyncio.run(_pool_per_s(data, target))
    return found


async def _pool_per_s(data: bytes, target: Target) -> float:
    made = PreprocessPool(None, isolated=True)
    try:
        await made.prepare(PIPELINE, target)
        await capacity(by_pool(made, data), 1.0)
        return await capacity(by_pool(made, data), SECONDS)
    finally:
        made.close()


def served(card: Any) -> Found:
    if not (EXAMPLES / "photo").is_dir():
        command = [sys.executable, "-m", "server", "demo-models", "photo", "--out", str(EXAMPLES)]
        subprocess.run(command, cwd=REPOSITORY, check=True)
    data = photograph(640, 480, SIZES[640, 480])
    ready = torch.empty(ImageSteps(preset="imagenet-eval").shape)
    write_image(data, ImageSteps(preset="imagenet-eval"), CPU, ready)
    tensor = _tensor_request(ready.numpy())
    found: Found = {}
    for name, decoder, (body, headers) in (
        ("cpu", "cpu", (data, "")),
        ("gpu", NVIMAGECODEC, (data, "")),
        ("free", "cpu", tensor),
    ):
        flags = ("--model-repository", str(EXAMPLES), "--gpu", "nvml", "--preprocess-decoder", decoder)
        with running(*flags, "--no-strict-readiness", "--drain-delay-secs", "0") as daemon:
            asyncio.run(_load(daemon.http, body, headers, 2.0))
            found[f"{name}_per_s"] = asyncio.run(_load(daemon.http, body, headers, SECONDS))
    for name in ("cpu", "gpu"):
        found[f"{name}_share_of_free"] = found[f"{name}_per_s"] / found["free_per_s"]
    return found


def _tensor_request(x: np.ndarray[Any, Any]) -> tuple[bytes, str]:
    entry = {
        "name": "x",
        "datatype": "FP32",
        "shape": [1, *x.shape],
        "parameters": {"binary_data_size": x.nbytes},
    }
    head = json.dumps({"inputs": [entry]}).encode()
    return head + x.tobytes(), f"Inference-Header-Content-Length: {len(head)}\r\n"


async def _load(address: str, body: bytes, headers: str, seconds: float) -> float:
    """Answers a second, over so many connections."""
    host, _, port = address.partition(":")
    head = f"POST /v2/models/photo/infer HTTP/1.1\r\nHost: {address}\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    end_s = time.monotonic() + seconds
    answered = 0

    async def client() -> None:
        nonlocal answered
        reader, writer = await asyncio.open_connection(host, int(port))
        while time.monotonic() < end_s:
            writer.write(head.encode() + body)
            reply = await reader.readuntil(b"\r\n\r\n")
            if not reply.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(reply.decode())
            length = int(reply.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            answered += 1
        writer.close()

    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return answered / seconds


CHECKS: dict[str, Callable[[Any], Found]] = {
    "agreement": agreement,
    "sentinel": sentinel,
    "race": race,
    "pool": pool,
    "served": served,
}


def reason_not_to() -> str:
    """Why nothing can be measured here; empty where it can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU with CUDA"
    if find_spec("nvidia") is None or find_spec("nvidia.nvimgcodec") is None:
        return "nvImageCodec is not installed: pip install 'migserve[torch,nvimagecodec]'"
    return ""


def measured() -> Found:
    """What each check has found, or how it failed: one that fails keeps no other from being done."""
    from preprocess.nvimagecodec import open_card

    found: Found = {"measured": True, "gpu": torch.cuda.get_device_name(0), "torch": torch.__version__}
    card = open_card()
    for name, check in CHECKS.items():
        print(f"{name} ...", flush=True)
        try:
            found[name] = check(card)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
    return found


def lines(found: Found) -> Iterator[str]:
    """What is printed, and drawn."""
    yield f"Pictures on a GPU, {found['date']}: " + (found["gpu"] if found["measured"] else "not measured")
    if not found["measured"]:
        yield found["reason"]
    for name in CHECKS:
        if name in found:
            values = [
                f"{key} {f'{value:.3g}' if isinstance(value, float) else value}" for key, value in found[name].items()
            ]
            yield f"{name}: " + ", ".join(values)


def drawing(found: Found) -> str:
    """The figures, with a bar for each rate."""
    text = list(lines(found))
    rates = {
        f"{check}, {key.removesuffix('_per_s')}": value
        for check in ("pool", "served")
        for key, value in found.get(check, {}).items()
        if key.endswith("_per_s")
    }
    height = 20 * (len(text) + len(rates)) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    parts += [f'<text x="10" y="{20 + 20 * row}">{escape(line)}</text>' for row, line in enumerate(text)]
    most = max(rates.values(), default=1.0)
    for row, (name, rate) in enumerate(rates.items(), start=len(text)):
        y = 12 + 20 * row
        parts.append(f'<rect x="130" y="{y}" width="{600 * rate / most:.0f}" height="14" fill="#3b7dd8"/>')
        parts.append(f'<text x="10" y="{y + 11}">{escape(name)}</text>')
        parts.append(f'<text x="{138 + 600 * rate / most:.0f}" y="{y + 11}">{rate:.0f}/s</text>')
    return "\n".join([*parts, "</svg>\n"])


def main(write: Annotated[bool, typer.Option("--write", help="Keep them in benchmarks/results.")] = False) -> None:
    """Measures, prints, and writes one JSON and one picture."""
    why = reason_not_to()
    found = {"measured": False, "reason": why} if why else measured()
    found |= {"date": time.strftime("%Y-%m-%d"), "machine": platform.machine()}
    for line in lines(found):
        Console(width=200).print(line, markup=False)
    folder = RESULTS if write else KEPT
    folder.mkdir(exist_ok=True)
    (folder / "bench-gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "bench-gpu.svg").write_text(drawing(found))
    failed = [name for name in CHECKS if "error" in found.get(name, {}) or not found.get(name, {}).get("passed", True)]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    typer.run(main)
