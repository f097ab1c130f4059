"""A peer for benchmarks.pictures: MLServer, two workers, the JPEG as base64 in the Open Inference Protocol's JSON.

Its adaptive batching joins requests whose BYTES inputs it cannot stack when their sizes differ; here all are the same.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import torch
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import Base64Codec
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

from benchmarks.peer_fastapi import load, prepare


class Small(MLModel):
    """Decodes, and runs what it was given as one batch."""

    async def load(self) -> bool:
        self.model: Any = load(os.environ["PEER_MODEL"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        pictures = Base64Codec.decode_input(payload.inputs[0])
        with torch.inference_mode():
            scores = self.model(torch.stack([prepare(data) for data in pictures]))["scores"]
        output = ResponseOutput(
            name="scores", datatype="FP32", shape=list(scores.shape), data=scores.flatten().tolist()
        )
        return InferenceResponse(model_name=self.name, outputs=[output])


async def main(port: int) -> None:
    """Serves."""
    settings = Settings(
        host="127.0.0.1", http_port=port, grpc_port=port + 1, metrics_port=port + 2, parallel_workers=2, debug=False
    )
    server = MLServer(settings)
    await server.start([ModelSettings(name="small", implementation=Small)])


if __name__ == "__main__":
    os.environ["PEER_MODEL"] = sys.argv[2]
    asyncio.run(main(int(sys.argv[1])))
