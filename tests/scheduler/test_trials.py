"""First runs of a model with lengths: what it takes at each, and whether padding changes its answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from scheduler.backends import ModelLoadError
from scheduler.backends.torch import TorchBackend
from scheduler.lengths import ByLength, Lengths
from scheduler.trials import measure_lengths
from server.model_files import read_model
from tests import repositories


def measured(folder: Path, lengths: str, *, told: bool = True) -> ByLength:
    source, *_ = read_model(repositories.masked(folder, lengths, told=told), 1, 1)
    assert isinstance(source.lengths, Lengths)
    return measure_lengths(TorchBackend(source), source.lengths)


def test_each_length_is_measured_in_batches_of_all_sizes(tmp_path: Path) -> None:
    by_length = measured(tmp_path / "m", "{longest: 64, length: n}")
    assert [length for length, _ in by_length] == [2, 4, 8, 16, 32, 64]
    assert all([batch for batch, _ in points] == [1, 2, 4, 8] for _, points in by_length)
    assert [length for length, _ in measured(tmp_path / "n", "{buckets: [7, 50], length: n}")] == [7, 50]


@pytest.mark.parametrize(
    ("lengths", "told", "message"),
    [
        ("{longest: 64, length: n}", False, "padding changes output mean: an item of length 2 is answered otherwise"),
        ("{longest: 64, length: m}", True, "lengths.length is 'm', but the model's inputs are x, n"),
        ("{longest: 64, mask: x}", True, r"lengths.mask: input x is FP32 \[-1\], expected INT64"),
        ("{longest: 1, length: n}", True, "lengths.longest is 1; the model takes 2 or more"),
    ],
)
def test_lengths_that_do_not_fit_the_model_are_refused(lengths: str, told: bool, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=message):
        measured(tmp_path / "m", lengths, told=told)


def test_padding_that_changes_whole_numbers_is_noticed_too(tmp_path: Path) -> None:
    source, *_ = read_model(
        repositories.masked(tmp_path, "{longest: 64, length: n}", model=repositories.Counted()), 1, 1
    )
    assert isinstance(source.lengths, Lengths)
    with pytest.raises(ModelLoadError, match="padding changes output count"):
        measure_lengths(TorchBackend(source), source.lengths)
