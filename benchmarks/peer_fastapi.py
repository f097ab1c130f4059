"""A peer for benchmarks.pictures: a plain FastAPI endpoint, no batches, a thread a request.

Takes a JPEG as the body, does what torchvision's evaluation transform does with a Pillow image, runs the same exported
CNN, and answers its scores as JSON.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from PIL import Image

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def prepare(data: bytes) -> torch.Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    short = min(width, height)
    size = (int(256 * width / short), int(256 * height / short))
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
    pixels = np.array(image.crop((left, top, left + 224, top + 224)))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div(255).sub_(MEAN).div_(STD)


def load(path: str) -> Any:
    torch.set_num_threads(1)
    return torch.export.load(path).module()


def main(port: int, model_path: str) -> None:
    """Serves."""
    app = FastAPI()
    model = load(model_path)

    def answer(data: bytes) -> list[float]:
        with torch.inference_mode():
            scores: list[float] = model(prepare(data)[None])["scores"][0].tolist()
        return scores

    @app.post("/")
    async def infer(request: Request) -> JSONResponse:
        return JSONResponse({"scores": await run_in_threadpool(answer, await request.body())})

    uvicorn.run(app, port=port, log_level="error", access_log=False)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
