"""Declared preprocessing, checked against the model's input. Pure.

In serving.yaml:

    preprocess:
      input: image          # a BYTES input that clients may send, one element an item, instead of
      output: x             # this input of the model
      image: {preset: imagenet-eval}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from preprocess import framing
from preprocess.gate import MAX_PIXELS

# What a preset sets; whatever is written beside it wins. imagenet-eval: how torchvision evaluates its classifiers.
IMAGE_PRESETS: dict[str, dict[str, Any]] = {
    "imagenet-eval": {
        "mode": "RGB",
        "resize": 256,
        "crop": 224,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
}
# Of a side of the picture that a model takes.
MAX_SIDE = 8192


class PipelineError(ValueError):
    """A pipeline that does not fit the model. The message says what was expected."""


class ImageSteps(BaseModel):
    """Decode, convert to `mode`, turn by EXIF if `exif`, resize, crop in the middle, divide, normalise.

    `resize`: the short side in pixels, the other in proportion; or else `size`: height and width, whatever the
    proportions. `interpolation`: bilinear or bicubic, antialiased; area: each pixel the mean of what it covers. `crop`:
    height and width, or one number for both. Levels 0 to 255 become (level / divide_by - mean) / std, or stay as they
    are if `dtype` is UINT8. `dct_scaling`: decode large JPEGs at a fraction of their size, not below twice what is
    resized to: quicker, and off by up to 12 levels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Literal["imagenet-eval"] | None = None
    mode: Literal["L", "RGB"] = "RGB"
    exif: bool = False
    resize: int | None = Field(None, ge=1, le=MAX_SIDE)
    size: tuple[int, int] | None = None
    interpolation: Literal["bilinear", "bicubic", "area"] = "bilinear"
    crop: int | tuple[int, int] | None = None
    divide_by: float = Field(255.0, gt=0)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: Literal["FP32", "FP16", "UINT8"] = "FP32"
    layout: Literal["CHW", "HWC"] = "CHW"
    max_pixels: int = Field(MAX_PIXELS, ge=1)
    dct_scaling: bool = False

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        preset = IMAGE_PRESETS.get(str(given.get("preset"))) if isinstance(given, dict) else None
        if preset is None:
            return given
        drop = {"resize"} if given.get("size") is not None else set()
        return {name: value for name, value in preset.items() if name not in drop} | given

    @model_validator(mode="after")
    def _makes_sense(self) -> ImageSteps:
        if (self.size is None) == (self.resize is None):
            raise ValueError("give either resize, of the short side, or size: [height, width]")
        sides = (*(self.size or ()), *(_both(self.crop) or ()))
        if any(not 1 <= side <= MAX_SIDE for side in sides):
            raise ValueError(f"sizes are 1 to {MAX_SIDE} pixels")
        if self.resize is not None and self.crop is None:
            raise ValueError("resize leaves pictures of different widths; give a crop as well, or size instead")
        height, width = self.size or (self.resize, self.resize)
        rows, columns = self.frame
        if rows > (height or 0) or columns > (width or 0):
            raise ValueError(f"crop {rows} x {columns} is larger than what is resized to, {height} x {width}")
        self._check_levels()
        return self

    def _check_levels(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values, mode {self.mode} takes {self.channels}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("std must be above 0")
        if self.dtype == "UINT8" and (self.mean is not None or "divide_by" in self.model_fields_set):
            raise ValueError("UINT8 is for levels as they are, without divide_by, mean and std")

    @property
    def channels(self) -> int:
        return 1 if self.mode == "L" else 3

    @property
    def frame(self) -> tuple[int, int]:
        """Height and width of what is left after the crop."""
        return _both(self.crop) or self.size or (0, 0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one item."""
        return (self.channels, *self.frame) if self.layout == "CHW" else (*self.frame, self.channels)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture is resized to, before the crop."""
        if self.resize is not None:
            return framing.resized(width, height, self.resize)
        rows, columns = self.size or self.frame
        return columns, rows


def _both(side: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (side, side) if isinstance(side, int) else side


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
    steps = pipeline.image
    made = steps.shape
    if (
        datatype != steps.dtype
        or len(dims) != 3
        or any(dim not in (-1, size) for dim, size in zip(dims, made, strict=True))
    ):
        swapped = len(dims) == 3 and dims[-1] == steps.channels and steps.layout == "CHW"
        hint = "; did you mean layout: HWC?" if swapped and dims[0] != steps.channels else ""
        raise PipelineError(
            f"preprocess.image makes {steps.dtype} {list(made)}, "
            f"input {pipeline.output} is {datatype} {list(dims)}{hint}"
        )
