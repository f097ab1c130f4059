"""A copy of a model is the same one, another under its name is not."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest

from preprocess.pipeline import PipelineFile
from preprocess.steps import ImageSteps, TextSteps
from scheduler import model_file
from scheduler.channel import ModelSource
from server import model_identity

PICTURES = PipelineFile(input="image", output="x", image=ImageSteps(mode="L", size=(1, 1)))


def source(path: Path) -> ModelSource:
    return ModelSource("m/1#1", "m", 1, "torch", str(path), digest=model_file.digest(str(path)))


def archive(path: Path, weights: bytes, saved_as: str = "model") -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{saved_as}/data/weights/weight_0", weights)
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return archive(tmp_path / "model.pt2", b"weights of one")


def test_a_copy_is_the_same_model(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    copy = Path(shutil.copyfile(saved, tmp_path / "elsewhere" / "model.pt2"))
    assert model_identity.of(source(saved), PICTURES) == model_identity.of(source(copy), PICTURES) != ""


def test_the_name_that_it_was_saved_under_does_not_count(saved: Path, tmp_path: Path) -> None:
    before = model_file.digest(str(saved))
    assert before == model_file.digest(str(archive(tmp_path / "other.pt2", b"weights of one", saved_as="other"))) != ""


def test_other_weights_are_another_model(saved: Path) -> None:
    before = model_identity.of(source(saved), None)
    archive(saved, b"weights of two")
    assert model_identity.of(source(saved), None) != before


def test_other_preprocessing_is_another_model_but_not_where_it_is_done_or_what_is_refused(saved: Path) -> None:
    with_pictures = model_identity.of(source(saved), PICTURES)
    assert with_pictures != model_identity.of(source(saved), None)
    assert with_pictures == model_identity.of(source(saved), PICTURES.model_copy(update={"device": "cpu"}))
    more = ImageSteps(mode="L", size=(1, 1), max_pixels=10)
    assert with_pictures == model_identity.of(source(saved), PICTURES.model_copy(update={"image": more}))
    larger = PipelineFile(input="image", output="x", image=ImageSteps(mode="L", size=(2, 2)))
    assert with_pictures != model_identity.of(source(saved), larger)


def test_a_tokenizer_counts_by_what_is_in_it(saved: Path, tmp_path: Path) -> None:
    found = []
    for name, text in (("a.json", "{}"), ("b.json", "{}"), ("c.json", "{ }")):
        (tmp_path / name).write_text(text)
        steps = TextSteps(tokenizer=str(tmp_path / name), max_tokens=6)
        found.append(model_identity.of(source(saved), PipelineFile(input="text", output="ids", text=steps)))
    assert found[0] == found[1] != found[2]


def test_a_model_without_a_file_has_none_of_a_file(tmp_path: Path) -> None:
    assert source(tmp_path / "model.pt2").digest == ""
