"""Items into batches of one shape: filled up, and cut where preprocessing has filled up further than need be."""

from __future__ import annotations

import numpy as np

from scheduler.lengths import Lengths
from server.job_inputs import Item
from server.job_preparing import grouped, tensors_of_batch
from tests.served import make_sound_model

LENGTHS = Lengths(20, length="frames")
EDGES = (5, 10)
MODEL = make_sound_model(LENGTHS)


def item(length: int, filled_to: int) -> Item:
    """Features as a pipeline leaves them: more than its own are zeros."""
    features = np.zeros((80, filled_to), np.float32)
    features[:, :length] = np.random.default_rng(length).standard_normal((80, length))
    frames = np.int64(length).tobytes()
    made = Item(0, 0, parts=(frames, features.tobytes()), dims=(filled_to,), length=length)
    made.bucket = grouped(made, LENGTHS, EDGES)
    return made


def features_of(items: list[Item]) -> tuple[list[int], np.ndarray]:
    frames, features = tensors_of_batch(MODEL, items)
    told = np.frombuffer(b"".join(frames.data), np.int64).tolist()
    return told, np.frombuffer(b"".join(features.data), np.float32).reshape(features.shape)


def test_items_of_a_bucket_become_one_array() -> None:
    items = [item(3, 4), item(5, 6), item(4, 4)]
    assert [each.bucket for each in items] == [(5,)] * 3
    told, features = features_of(items)
    assert told == [3, 5, 4]
    assert features.shape == (3, 80, 5), "not longer than the longest, though one was filled up to 6"
    for each, found in zip(items, features, strict=True):
        own = np.frombuffer(each.parts[1], np.float32).reshape(80, -1)[:, : each.length]
        assert (found[:, : each.length] == own).all()
        assert (found[:, each.length :] == 0).all()


def test_items_that_are_alike_are_handed_on_as_they_are() -> None:
    items = [item(3, 4), item(4, 4)]
    _, features = tensors_of_batch(MODEL, items)
    assert [part.obj is each.parts[1] for part, each in zip(features.data, items, strict=True)] == [True, True]


def test_an_item_that_came_while_nobody_served_its_model_is_not_cut_to_the_length_of_others() -> None:
    """There were no edges then: it knows its length by its dims only."""
    whole = np.full((80, 10), 7.0, np.float32)
    early = Item(0, 0, parts=(np.int64(10).tobytes(), whole.tobytes()), dims=(10,))
    early.bucket = grouped(early, LENGTHS, ())
    _, features = features_of([item(7, 8), early])
    assert features.shape == (2, 80, 10)
    assert (features[1] == whole).all()


def test_what_no_bucket_holds_stays_by_itself() -> None:
    assert item(11, 11).bucket == (11,)
    differing = Item(0, 0, dims=(3, 4))
    assert grouped(differing, LENGTHS, EDGES) == (3, 4)
    assert grouped(Item(0, 0, dims=(3,)), None, (0,)) == (3,), "of a model that does not pad"
