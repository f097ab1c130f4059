from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from preprocess.errors import BadInputError
from preprocess.pipeline import PipelineError, PipelineFile, checked
from preprocess.pool import PreprocessPool
from preprocess.steps import TextSteps
from preprocess.text import load, read_text


def make_tokenizer(path: Path, *, pads: bool = True) -> None:
    """A few words, from 1 on; and, as in many files, it fills up and cuts, which is not to be kept."""
    words = {"[UNK]": 0, "the": 1, "cat": 2, "sat": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if pads:
        tokenizer.enable_padding(length=128)
        tokenizer.enable_truncation(2)
    tokenizer.save(str(path))


@pytest.fixture
def steps(tmp_path: Path) -> TextSteps:
    make_tokenizer(tmp_path / "tokenizer.json")
    return TextSteps(tokenizer=str(tmp_path / "tokenizer.json"), max_tokens=4)


def test_ids_are_neither_filled_up_nor_cut_by_the_file(steps: TextSteps) -> None:
    values, length = read_text(b"the cat sat", steps)
    assert (values.tolist(), length) == ([1, 2, 3], 3)
    assert read_text("the kočka".encode(), steps).values.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a text without a token in it"),
        (b" ", "a text without a token in it"),
        (b"cat " * 5, "a text of 5 tokens; at most 4 are taken"),
        (b"cat \xff", "5 bytes that are not text in UTF-8: invalid start byte at byte 4"),
        (b"cat " * 100_000, "a text of 400000 bytes; at most 262144"),
    ],
)
def test_what_is_no_text_for_it_is_refused(data: bytes, message: str, steps: TextSteps) -> None:
    with pytest.raises(BadInputError, match=message):
        read_text(data, steps)


def test_texts_are_cut_where_the_model_says_so(steps: TextSteps) -> None:
    assert read_text(b"cat " * 5, steps.model_copy(update={"truncate": True})).length == 4


def test_the_file_is_looked_for_beside_the_model_and_at_its_loading(tmp_path: Path) -> None:
    pipeline = PipelineFile(input="text", output="ids", text=TextSteps(tokenizer="words.json")).placed(
        str(tmp_path), None
    )
    assert pipeline.text is not None
    with pytest.raises(PipelineError, match=r"words\.json cannot be read"):
        load(pipeline.text)
    make_tokenizer(tmp_path / "words.json")
    assert read_text(b"cat", pipeline.text).values.tolist() == [2]


def test_the_models_inputs_are_checked() -> None:
    steps = TextSteps(tokenizer="t.json")
    pipeline = PipelineFile(input="text", output="ids", mask="mask", length="n", text=steps)
    checked(pipeline, {"ids": ("INT64", (-1,)), "mask": ("INT64", (-1,)), "n": ("INT64", ())})
    with pytest.raises(
        PipelineError, match=r"preprocess\.output is 'ids' and 'n' and 'mask', but the model's inputs are ids"
    ):
        checked(pipeline, {"ids": ("INT64", (-1,))})
    with pytest.raises(PipelineError, match=r"preprocess.text makes INT64 \[-1\], input mask is FP32"):
        checked(pipeline, {"ids": ("INT64", (-1,)), "mask": ("FP32", (-1,)), "n": ("INT64", ())})


def test_a_pool_says_so_when_a_model_is_loaded(tmp_path: Path) -> None:
    import asyncio

    async def story() -> None:
        pool = PreprocessPool(1)
        pipeline = PipelineFile(input="text", output="ids", text=TextSteps(tokenizer=str(tmp_path / "none.json")))
        with pytest.raises(PipelineError, match=r"none\.json cannot be read"):
            await pool.prepare(pipeline)
        pool.close()

    asyncio.run(story())
