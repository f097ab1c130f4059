"""What was preprocessed, into the memory of the model's inputs. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from preprocess.items import Item
from preprocess.pipeline import PipelineFile

NUMPY: dict[str, Any] = {"FP32": np.float32, "FP16": np.float16, "UINT8": np.uint8, "INT64": np.int64}

# By name, the memory of each input of the model that is to be filled.
Places = Mapping[str, memoryview]


def write_items(pipeline: PipelineFile, items: Sequence[Item], length: int, places: Places) -> None:
    """Items of up to `length`, each filled up with zeros behind its end."""
    shape = (len(items), *(length if dim == -1 else dim for dim in pipeline.steps.shape))
    whole = array(places[pipeline.output], pipeline.steps.dtype, shape)
    for index, item in enumerate(items):
        write_values(pipeline, item, index, whole, places)


def write_values(pipeline: PipelineFile, item: Item, index: int, whole: np.ndarray[Any, Any], places: Places) -> None:
    """One item into its place in `whole`, the output's memory, and what is told of its length."""
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
