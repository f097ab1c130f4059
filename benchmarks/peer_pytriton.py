"""A peer for benchmarks.pictures: nvidia-pytriton, Triton with its dynamic batcher before Python; the JPEG as BYTES."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.peer_fastapi import load, prepare


class Small:
    """Prepares and runs a batch. One instance: with two its handshake fails in 0.7.0."""

    def __init__(self, path: str) -> None:
        self.model: Any = load(path)
        self.threads = ThreadPoolExecutor(2)

    @batch
    def __call__(self, image: Any) -> dict[str, Any]:
        with torch.inference_mode():
            x = torch.stack(list(self.threads.map(prepare, image[:, 0])))
            return {"scores": self.model(x)["scores"].numpy()}


if __name__ == "__main__":
    port, path = int(sys.argv[1]), sys.argv[2]
    config = TritonConfig(http_port=port, grpc_port=port + 1, metrics_port=port + 2)
    with Triton(config=config) as triton:
        triton.bind(
            model_name="small",
            infer_func=Small(path),
            inputs=[Tensor(name="image", dtype=np.bytes_, shape=(1,))],
            outputs=[Tensor(name="scores", dtype=np.float32, shape=(10,))],
            config=ModelConfig(max_batch_size=8, batcher=DynamicBatcher(max_queue_delay_microseconds=1000)),
        )
        triton.serve()
