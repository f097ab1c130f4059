"""What a thread of the pool does. It takes torch with it, a second and 200 MB: imported where a model asks for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from preprocess.cards import open_decoder
from preprocess.clips import read_clip
from preprocess.decoders import CpuDecoder, Decoder
from preprocess.images import write_image
from preprocess.items import Item
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

    def read_item(self, pipeline: PipelineFile, data: bytes) -> Item:
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
        _write_values(pipeline, read_item(pipeline, data), index, whole, places)


def read_item(pipeline: PipelineFile, data: bytes) -> Item:
    """As `Local.read_item`."""
    if pipeline.text is not None:
        from preprocess.text import read_text  # a package that only these need

        item = read_text(data, pipeline.text)
    else:
        assert pipeline.audio is not None
        item = read_clip(data, pipeline.audio)
    pipeline.bucket(item.length)
    return item


def write_items(pipeline: PipelineFile, items: Sequence[Item], length: int, places: Places) -> None:
    """Items of up to `length`, each filled up with zeros behind its end."""
    shape = (len(items), *(length if dim == -1 else dim for dim in pipeline.steps.shape))
    whole = array(places[pipeline.output], pipeline.steps.dtype, shape)
    for index, item in enumerate(items):
        _write_values(pipeline, item, index, whole, places)


def _write_values(pipeline: PipelineFile, item: Item, index: int, whole: np.ndarray[Any, Any], places: Places) -> None:
    size = item.values.shape[-1]
    whole[index, ..., :size] = item.values
    whole[index, ..., size:] = 0
    if pipeline.length is not None:
        array(places[pipeline.length], "INT64", (len(whole),))[index] = item.length
    if pipeline.mask is not None:
        mask = array(places[pipeline.mask], "INT64", (len(whole), whole.shape[-1]))[index]
        mask[: item.length] = 1
        mask[item.length :] = 0


def array(place: memoryview, datatype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The memory, or the beginning of it, as a tensor."""
    return np.frombuffer(place, NUMPY[datatype], math.prod(shape)).reshape(shape)
