"""A peer for benchmarks.pictures: LitServe, batches of up to 8. It takes JSON, so the JPEG comes as base64."""

from __future__ import annotations

import base64
import sys
from typing import Any

import litserve
import numpy as np
import torch

from benchmarks.peer_fastapi import load, prepare


class Small(litserve.LitAPI):
    """A JPEG is prepared in LitServe's worker, one thread an element, as its guide does it."""

    def setup(self, device: str) -> None:
        self.model = load(sys.argv[2])

    def decode_request(self, request: dict[str, str]) -> Any:
        return prepare(base64.b64decode(request["image"])).numpy()

    def batch(self, inputs: list[Any]) -> torch.Tensor:
        return torch.from_numpy(np.stack(inputs))

    def predict(self, x: torch.Tensor) -> list[list[float]]:
        with torch.inference_mode():
            scores: list[list[float]] = self.model(x)["scores"].tolist()
        return scores

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        return output

    def encode_response(self, output: list[float]) -> dict[str, list[float]]:
        return {"scores": output}


if __name__ == "__main__":
    api = Small(max_batch_size=8, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=2)
    server.run(port=int(sys.argv[1]), log_level="error", generate_client_file=False)
