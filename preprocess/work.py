"""What a thread of the pool does. It takes torch with it, a second and 200 MB: imported where a model asks for it."""

from __future__ import annotations

import numpy as np
import torch

from preprocess.decoders import CpuDecoder, Decoder
from preprocess.images import write_image
from preprocess.pipeline import PipelineFile

# One picture has one thread: there are others to decode, and waking a team for a millisecond's work costs as much.
torch.set_num_threads(1)

CPU = CpuDecoder()
NUMPY = {"FP32": np.float32, "FP16": np.float16, "UINT8": np.uint8}


def write_item(
    pipeline: PipelineFile, data: bytes, index: int, items: int, target: memoryview, decoder: Decoder = CPU
) -> None:
    """One element into its place in `target`, which holds `items` items. Raises BadInputError."""
    steps = pipeline.image
    whole = np.frombuffer(target, NUMPY[steps.dtype]).reshape(items, *steps.shape)
    write_image(data, steps, decoder, torch.from_numpy(whole[index]))
