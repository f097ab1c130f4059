"""What a thread of the pool does. It takes torch with it, a second and 200 MB: imported where a model asks for it."""

from __future__ import annotations

import torch

from preprocess.cards import open_decoder
from preprocess.clips import read_clip
from preprocess.decoders import CpuDecoder, Decoder
from preprocess.images import write_image
from preprocess.items import Item
from preprocess.pipeline import PipelineFile
from preprocess.places import Places, array, write_values
from preprocess.stages import stage

# One picture has one thread: there are others to decode, and waking a team for a millisecond's work costs as much.
torch.set_num_threads(1)

CPU = CpuDecoder()


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
        write_values(pipeline, read_item(pipeline, data), index, whole, places)


def read_item(pipeline: PipelineFile, data: bytes) -> Item:
    """As `Local.read_item`."""
    if pipeline.text is not None:
        from preprocess.text import read_text  # a package that only these need

        with stage("transform"):
            item = read_text(data, pipeline.text)
    else:
        assert pipeline.audio is not None
        item = read_clip(data, pipeline.audio)
    pipeline.check_length(item.length)
    return item
