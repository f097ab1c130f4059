"""Declared preprocessing, checked against the model's input. Pure.

In serving.yaml:

    preprocess:
      input: image          # a BYTES input that clients may send, one element an item, instead of
      output: x             # this input of the model
      image: {mode: L, size: [8, 8]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class PipelineError(ValueError):
    """A pipeline that does not fit the model. The message says what was expected."""


class ImageSteps(BaseModel):
    """Decode, convert to `mode`, resize to `size` (height, width) by area, divide by `divide_by`; FP32, CHW."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["L", "RGB"] = "RGB"
    size: tuple[int, int]
    divide_by: float = Field(255.0, gt=0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one item: channels, height, width."""
        return (1 if self.mode == "L" else 3, *self.size)


class PipelineFile(BaseModel):
    """The `preprocess` section of serving.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: str
    output: str
    image: ImageSteps


def checked(pipeline: PipelineFile, inputs: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Does the pipeline make what the model takes? `inputs`: name -> (datatype, dims of an item).

    Raises PipelineError.
    """
    if set(inputs) != {pipeline.output}:
        raise PipelineError(
            f"preprocess.output is {pipeline.output!r}, but the model's inputs are {', '.join(inputs)}; "
            f"a pipeline feeds a model of one input"
        )
    if pipeline.input == pipeline.output:
        raise PipelineError(f"preprocess.input must have another name than the model's own input {pipeline.output!r}")
    datatype, dims = inputs[pipeline.output]
    made = pipeline.image.shape
    if datatype != "FP32" or len(dims) != 3 or any(dim not in (-1, size) for dim, size in zip(dims, made, strict=True)):
        raise PipelineError(
            f"preprocess.image makes FP32 {list(made)}, input {pipeline.output} is {datatype} {list(dims)}"
        )
