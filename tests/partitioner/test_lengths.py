from __future__ import annotations

from itertools import pairwise

import pytest

from partitioner import latency
from partitioner.latency import LatencyTableError, Measurement
from partitioner.lengths import length_tables


def row(length: int | None, batch: int, ms: float, gpcs: int = 1) -> Measurement:
    return Measurement("m", f"{gpcs}g.5gb", gpcs, batch, 1, ms, seq_len=length)


def test_an_item_of_another_length_weighs_as_many_of_the_reference_as_take_its_time() -> None:
    """64 tokens: 5 ms and 1 ms an item. 32 items of 128 tokens take as long as 64 of 64 do."""
    measured = [*(row(64, batch, 5.0 + batch) for batch in (1, 2, 32, 128)), row(128, 32, 69.0), row(32, 32, 21.0)]
    table = length_tables(measured, "m", 64)[1]
    assert table.lengths == (32, 64, 128)
    assert table.rows[1] == pytest.approx([5.0 + batch for batch in range(1, 65)])
    assert table.rows[2] == pytest.approx([5.0 + 2 * batch for batch in range(1, 65)])
    assert table.rows[0][1:] == pytest.approx([5.0 + batch / 2 for batch in range(2, 65)])


def test_the_shipped_table_is_as_measured_and_longer_or_more_is_never_faster() -> None:
    measured = [each for each in latency.shipped_measurements("migprofiler") if each.gpu == "A100-80GB"]
    tables = length_tables(measured, "bert-base", 64)
    assert sorted(tables) == [1, 2, 3, 7]
    whole = tables[7]
    assert whole.lengths == (32, 64, 128, 256, 512)
    for each in measured:
        if each.model == "bert-base" and each.batch == 32 and each.seq_len:
            of_length = tables[each.gpcs].rows[tables[each.gpcs].lengths.index(each.seq_len)]
            assert of_length[31] == pytest.approx(each.latency_ms, rel=0.01)
    for table in tables.values():
        assert all(a <= b for of_length in table.rows for a, b in pairwise(of_length))
        assert all(a <= b for short, long in pairwise(table.rows) for a, b in zip(short, long, strict=True))


def test_a_table_without_lengths_is_refused() -> None:
    with pytest.raises(LatencyTableError, match="no measurements of 'm' name a seq_len"):
        length_tables([row(None, 1, 5.0)], "m", 8)
