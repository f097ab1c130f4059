"""Declared preprocessing, checked against the model's inputs. Pure.

In serving.yaml:

    preprocess:
      input: image          # a BYTES input that clients may send, one element an item, instead of
      output: x             # this input of the model
      image: {preset: imagenet-eval}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from preprocess.errors import BadInputError
from preprocess.steps import AudioSteps, ImageSteps, TextSteps

Inputs = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> datatype, dims of an item


class PipelineError(ValueError):
    """A pipeline that does not fit the model. The message says what was expected."""


class PipelineFile(BaseModel):
    """The `preprocess` section of serving.yaml.

    `length`: the model's INT64 input that is told how much of each item is no padding. `mask`: that which has a 1 for
    each token and a 0 for padding. `longest`: longer items are refused; set by the model's `lengths`.
    `device`: where pictures are decoded, see devices.py.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: str
    output: str
    length: str | None = None
    mask: str | None = None
    longest: int | None = Field(None, ge=1)
    device: Literal["auto", "cpu", "slice", "dedicated"] = "auto"
    image: ImageSteps | None = None
    audio: AudioSteps | None = None
    text: TextSteps | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> PipelineFile:
        if not self.input.isprintable() or set(self.input) & set('"\\'):
            raise ValueError('input must be a name without ", backslash and control characters, which JSON escapes')
        if sum(steps is not None for steps in (self.image, self.audio, self.text)) != 1:
            raise ValueError("give one of image, audio and text")
        if self.image is not None and self.length:
            raise ValueError("length is for what varies in length, which pictures do not")
        if self.text is None and self.mask:
            raise ValueError("mask is for text; sound has length")
        return self

    @property
    def steps(self) -> ImageSteps | AudioSteps | TextSteps:
        steps = self.image or self.audio or self.text
        assert steps is not None
        return steps

    @property
    def makes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The model's inputs that it fills: name -> datatype, dims of an item, -1 where they vary."""
        made: dict[str, tuple[str, tuple[int, ...]]] = {self.output: (self.steps.dtype, self.steps.shape)}
        if self.length is not None:
            made[self.length] = ("INT64", ())
        if self.mask is not None:
            made[self.mask] = ("INT64", (-1,))
        return made

    @property
    def varies(self) -> bool:
        return -1 in self.steps.shape

    def placed(self, folder: str, longest: int | None) -> PipelineFile:
        """The same, with files that are named by where they are in the model's folder."""
        pipeline = self if longest is None else self.model_copy(update={"longest": longest})
        if self.text is None:
            return pipeline
        text = self.text.model_copy(update={"tokenizer": f"{folder}/{self.text.tokenizer}"})
        return pipeline.model_copy(update={"text": text})

    def check_length(self, length: int) -> None:
        """Raises BadInputError for what is longer than the model takes."""
        if self.longest is not None and length > self.longest:
            raise BadInputError(f"{self._extent(length)}; at most {self._extent(self.longest)} are taken")

    def _extent(self, length: int) -> str:
        """With its unit; in seconds too, where clients know no frames."""
        if self.audio is None:
            return f"{length} tokens"
        return f"{length} frames ({length * self.audio.hop / self.audio.sample_rate:.4g} s)"


def checked(pipeline: PipelineFile, inputs: Inputs) -> None:
    """Does the pipeline make what the model takes? Raises PipelineError."""
    made = pipeline.makes
    if pipeline.input in inputs:
        raise PipelineError(f"preprocess.input must have another name than the model's own input {pipeline.input!r}")
    if set(inputs) != set(made):
        raise PipelineError(
            f"preprocess.output is {' and '.join(map(repr, made))}, but the model's inputs are {', '.join(inputs)}; "
            f"a pipeline feeds all of a model's inputs{_unnamed(pipeline, inputs)}"
        )
    for name, (datatype, dims) in made.items():
        _check_input(pipeline, name, datatype, dims, inputs[name])


def _unnamed(pipeline: PipelineFile, inputs: Inputs) -> str:
    """How to name those that it could feed, and does not."""
    forms: dict[str, tuple[tuple[int, ...], ...]] = {"mask": ((-1,),), "length": ((), (1,))}
    meanings = {"mask": "1 for a token, 0 for padding", "length": "how much is no padding"}
    hints = []
    for field, meaning in meanings.items():
        if getattr(pipeline, field) or pipeline.image is not None or (field == "mask" and pipeline.text is None):
            continue
        fit = [name for name, (datatype, dims) in inputs.items() if datatype == "INT64" and dims in forms[field]]
        if names := " or ".join(name for name in fit if name not in pipeline.makes):
            hints.append(f"; preprocess.{field} may name {names} ({meaning})")
    return "".join(hints)


def _check_input(
    pipeline: PipelineFile, name: str, datatype: str, dims: tuple[int, ...], taken: tuple[str, tuple[int, ...]]
) -> None:
    if name == pipeline.length and taken == ("INT64", (1,)):
        return
    if datatype == taken[0] and _fits(dims, taken[1]):
        return
    kind = next(kind for kind in ("image", "audio", "text") if getattr(pipeline, kind) is not None)
    raise PipelineError(
        f"preprocess.{kind} makes {datatype} {list(dims)}, "
        f"input {name} is {taken[0]} {list(taken[1])}{_hint(pipeline, dims, taken[1])}"
    )


def _fits(dims: tuple[int, ...], taken: tuple[int, ...]) -> bool:
    return len(dims) == len(taken) and all(takes in (-1, size) for size, takes in zip(dims, taken, strict=True))


def _hint(pipeline: PipelineFile, dims: tuple[int, ...], taken: tuple[int, ...]) -> str:
    if _fits(dims, taken[1:]):
        return (
            "; its first axis is one of items, which must vary: export the model with "
            'dynamic_shapes={0: torch.export.Dim("batch", min=1, max=...)} for this input'
        )
    image = pipeline.image
    if image is None or image.layout != "CHW" or len(taken) != 3:
        return ""
    return "; did you mean layout: HWC?" if taken[2] == image.channels != taken[0] else ""
