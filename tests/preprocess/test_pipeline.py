from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from preprocess.pipeline import ImageSteps, PipelineError, PipelineFile, checked
from preprocess.steps import TextSteps

GREY8 = ImageSteps(mode="L", size=(8, 8))
PIPELINE = PipelineFile(input="image", output="x", image=GREY8)


def test_a_pipeline_that_fits() -> None:
    checked(PIPELINE, {"x": ("FP32", (1, 8, 8))})
    checked(PIPELINE, {"x": ("FP32", (1, -1, -1))})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"y": ("FP32", (1, 8, 8))}, "preprocess.output is 'x', but the model's inputs are y"),
        ({"x": ("FP32", (1, 8, 8)), "y": ("FP32", ())}, "feeds all of a model"),
        ({"x": ("FP32", (3, 8, 8))}, r"makes FP32 \[1, 8, 8\], input x is FP32 \[3, 8, 8\]"),
        ({"x": ("UINT8", (1, 8, 8))}, "input x is UINT8"),
        ({"x": ("FP32", (8, 8))}, "input x is FP32"),
        ({"x": ("FP32", (4, 1, 8, 8))}, r"first axis is one of items, which must vary: .*torch\.export\.Dim"),
    ],
)
def test_a_pipeline_that_does_not_fit(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        checked(PIPELINE, inputs)


@pytest.mark.parametrize(
    ("given", "others", "hint"),
    [
        ({}, {"m": ("INT64", (-1,))}, "inputs; preprocess.mask may name m (1 for a token, 0 for padding)"),
        ({}, {"n": ("INT64", ())}, "inputs; preprocess.length may name n (how much is no padding)"),
        ({}, {"n": ("INT64", (1,)), "m": ("INT64", (-1,))}, "mask may name m (1 for a token, 0 for padding); preproc"),
        ({"mask": "m"}, {"m": ("INT64", (-1,)), "kinds": ("INT64", (-1,))}, "of a model's inputs"),
        ({}, {"m": ("FP32", (-1,))}, "of a model's inputs"),
        ({"mask": "n"}, {"m": ("INT64", (-1,))}, "of a model's inputs"),
    ],
)
def test_inputs_that_it_could_feed_are_said_how_to_name(
    given: dict[str, Any], others: dict[str, Any], hint: str
) -> None:
    text = TextSteps(tokenizer="t.json", max_tokens=8)
    pipeline = PipelineFile(input="text", output="ids", text=text, **given)
    with pytest.raises(PipelineError) as caught:
        checked(pipeline, {"ids": ("INT64", (-1,)), **others})
    said = str(caught.value)
    assert hint in said
    assert said.endswith("inputs") == hint.endswith("inputs")


def test_another_layout_is_proposed_where_it_would_fit() -> None:
    pipeline = PipelineFile(input="image", output="x", image=ImageSteps(preset="imagenet-eval"))
    with pytest.raises(PipelineError, match="did you mean layout: HWC"):
        checked(pipeline, {"x": ("FP32", (224, 224, 3))})


def test_a_preset_can_be_changed_in_parts() -> None:
    preset = ImageSteps(preset="imagenet-eval")
    assert (preset.resize, preset.crop, preset.shape) == (256, 224, (3, 224, 224))
    other = ImageSteps.model_validate({"preset": "imagenet-eval", "resize": 400, "crop": [384, 320], "dtype": "FP16"})
    assert (other.shape, other.mean) == ((3, 384, 320), preset.mean)
    squeezed = ImageSteps.model_validate({"preset": "imagenet-eval", "size": [224, 224], "layout": "HWC"})
    assert (squeezed.resized(640, 480), squeezed.shape) == ((224, 224), (224, 224, 3))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give either resize"),
        ({"resize": 256, "size": [8, 8]}, "give either resize"),
        ({"resize": 256}, "give a crop as well"),
        ({"resize": 224, "crop": 256}, "crop 256 x 256 is larger than what is resized to, 224 x 224"),
        ({"size": [8, 9], "crop": [8, 10]}, "crop 8 x 10 is larger than what is resized to, 8 x 9"),
        ({"size": [0, 9]}, "sizes are 1 to 8192 pixels"),
        ({"size": [8, 9000]}, "sizes are 1 to 8192 pixels"),
        ({"size": [8, 8], "mean": [0.5, 0.5, 0.5]}, "mean and std belong together"),
        ({"size": [8, 8], "mean": [0.5], "std": [0.5]}, "mean has 1 values, mode RGB takes 3"),
        ({"size": [8, 8], "mode": "L", "mean": [0.5], "std": [0.0]}, "std must be above 0"),
        ({"size": [8, 8], "dtype": "UINT8", "divide_by": 255}, "UINT8 is for levels as they are"),
        ({"preset": "imagenet-eval", "dtype": "UINT8"}, "UINT8 is for levels as they are"),
        ({"preset": "imagenet", "size": [8, 8]}, "Input should be 'imagenet-eval'"),
    ],
)
def test_steps_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        ImageSteps.model_validate(given)
    assert message in str(refused.value)
