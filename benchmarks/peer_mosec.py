"""A peer for benchmarks.pictures: mosec, two processes that prepare, and one that runs batches of up to 8."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np
import torch
from mosec import Server, Worker

from benchmarks.peer_fastapi import load, prepare


class Prepare(Worker):
    """A JPEG to the model's input."""

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> Any:
        torch.set_num_threads(1)
        return prepare(data).numpy()


class Run(Worker):
    """Batches through the model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = load(os.environ["PEER_MODEL"])

    def forward(self, data: list[Any]) -> list[Any]:
        with torch.inference_mode():
            scores = self.model(torch.from_numpy(np.stack(data)))["scores"]
        return [{"scores": row} for row in scores.tolist()]

    def serialize(self, data: Any) -> bytes:
        return json.dumps(data).encode()


if __name__ == "__main__":
    port, os.environ["PEER_MODEL"] = sys.argv[1:]
    sys.argv = ["mosec", "--port", port, "--path", f"/tmp/mosec-{port}", "--log-level", "error"]
    server = Server()
    server.append_worker(Prepare, num=2)
    server.append_worker(Run, num=1, max_batch_size=8, max_wait_time=1)
    server.run()
