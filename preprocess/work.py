"""What a thread of the pool does. It takes torch with it, a second and 200 MB: imported where a model asks for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from preprocess.cards import open_decoder
from preprocess.clips import Clip, read_clip
from preprocess.decoders import CpuDecoder, Decoder
from preprocess.images import write_image
from preprocess.pipeline import PipelineFile

# One picture has one thread: there are others to decode, and waking a team for a millisecond's work costs as much.
torch.set_num_threads(1)

CPU = CpuDecoder()
NUMPY: dict[str, Any] = {"FP32": np.float32, "FP16": np.float16, "UINT8": np.uint8, "INT64": np.int64}

# By name, the memory of each input of the model that is to be filled.
Places = Mapping[str, memoryview]


class Local:
    """Elements done by the thread that asks for it."""

    def __init__(self, decoder: str) -> None:
        """Raises PipelineError where the decoder cannot be had."""
        self._decoder = open_decoder(decoder)

    def write_item(self, pipeline: PipelineFile, data: bytes, index: int, items: int, places: Places) -> None:
        """One element into its place among `items`; for what does not vary in length. Raises BadInputError."""
        write_item(pipeline, data, index, items, places, self._decoder)

    def read_item(self, pipeline: PipelineFile, data: bytes) -> Clip:
        """One element of what varies in length. Raises BadInputError."""
        return read_item(pipeline, data)

    def close(self) -> None:
        """Nothing is left."""


def write_item(
    pipeline: PipelineFile, data: bytes, index: int, items: int, places: Places, decoder: Decoder = CPU
) -> None:
    """As `Local.write_item`, with this decoder."""
    whole = array(places[pipeline.output], pipeline.steps.dtype, (items, *pipeline.steps.shape))
    if pipeline.image is not None:
        write_image(data, pipeline.image, decoder, torch.from_numpy(whole[index]))
    else:
        _write_clip(pipeline, read_item(pipeline, data), index, whole, places)


def read_item(pipeline: PipelineFile, data: bytes) -> Clip:
    """As `Local.read_item`."""
    assert pipeline.audio is not None
    clip = read_clip(data, pipeline.audio)
    pipeline.bucket(clip.length)
    return clip


def write_clips(pipeline: PipelineFile, clips: Sequence[Clip], frames: int, places: Places) -> None:
    """Clips of up to `frames`, each filled up with zeros behind its end."""
    shape = (len(clips), *(frames if dim == -1 else dim for dim in pipeline.steps.shape))
    whole = array(places[pipeline.output], pipeline.steps.dtype, shape)
    for index, clip in enumerate(clips):
        _write_clip(pipeline, clip, index, whole, places)


def _write_clip(pipeline: PipelineFile, clip: Clip, index: int, whole: np.ndarray[Any, Any], places: Places) -> None:
    frames = clip.features.shape[-1]
    whole[index, ..., :frames] = clip.features
    whole[index, ..., frames:] = 0
    if pipeline.length is not None:
        array(places[pipeline.length], "INT64", (len(whole),))[index] = clip.length


def array(place: memoryview, datatype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The memory, or the beginning of it, as a tensor."""
    return np.frombuffer(place, NUMPY[datatype], math.prod(shape)).reshape(shape)
