from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner import gangs, latency
from partitioner.latency import Measurement


def measured(batch: int, processes: int, ms: float, mig_profile: str = "1g.10gb", **others: object) -> Measurement:
    gpcs = int(mig_profile[0])
    return Measurement("m", mig_profile, gpcs, batch, processes, ms, **others)  # type: ignore[arg-type]


TABLE = gangs.gang_tables(
    [measured(1, 1, 10), measured(4, 1, 16), measured(1, 2, 14), measured(4, 2, 24), measured(8, 1, 20, "2g.20gb")]
)["m"]


def test_gangs_up_to_so_many_processes() -> None:
    assert [(gang.batch, gang.processes) for gang in TABLE.gangs(1, 1)] == [(1, 1), (4, 1)]
    assert len(TABLE.gangs(1, 2)) == 4
    assert TABLE.gangs(4, 1) == TABLE.gangs(2, 1)  # not measured: the nearest smaller size
    assert gangs.gang_tables([measured(8, 1, 20, "2g.20gb")])["m"].gangs(1, 1) == []


def test_queries_stay_whole() -> None:
    gang = gangs.Gang(batch=8, processes=2, latency_ms=100)
    assert gang.queries_per_s(1) == 160
    assert gang.queries_per_s(3) == 40  # two queries of three in each of two processes
    assert gang.queries_per_s(9) == 0
    # Between measured batches, only whole queries: 3 of up to 4 items.
    assert [(gang.batch, gang.latency_ms) for gang in TABLE.fitting(1, 1, 3)] == [(3, 14)]


def test_times_take_the_quickest_way_to_run_so_many() -> None:
    #  one process: 10 12 14 16 for 1..4 items; two: 14 for 2, 17.3 for 4, 20.7 for 6, 24 for 8
    assert TABLE.times_ms(1, 4, 2) == pytest.approx([10, 12, 14, 16, 20.667, 20.667, 24, 24], abs=0.01)
    assert TABLE.times_ms(1, 2, 1) == [10, 12]


SHIPPED = gangs.gang_tables(latency.shipped_measurements())


@given(st.sampled_from(sorted(SHIPPED)), st.data())
def test_times_of_shipped_tables_rise_and_end_with_the_gangs_own(model: str, data: st.DataObject) -> None:
    table = SHIPPED[model]
    gpcs = data.draw(st.sampled_from([1, 2, 3, 4, 7]))
    gang = data.draw(st.sampled_from(table.gangs(gpcs, 5)))
    times = table.times_ms(gpcs, gang.batch, gang.processes)
    assert len(times) == gang.items
    assert times == sorted(times)
    assert times[-1] == pytest.approx(gang.latency_ms)
    assert max(times) < float("inf")


def test_memory_is_bounded_by_what_has_fitted() -> None:
    assert TABLE.memory_mib(4, 2) == 10240
    assert TABLE.memory_mib(4, 1) == 5120  # two of them have fitted into 10 GiB
    assert TABLE.memory_mib(8, 1) == 20480
    assert TABLE.memory_mib(16, 1) == 0  # nothing is known
    table = gangs.gang_tables([measured(4, 1, 10, memory_mib=700.0), measured(4, 2, 10)])["m"]
    assert table.memory_mib(4, 1) == 700


def test_rows_of_other_gpus_are_left_out() -> None:
    rows = [measured(1, 1, 10, gpu="A100-80GB"), measured(1, 1, 5, gpu="H100-80GB"), measured(2, 1, 9)]
    table = gangs.gang_tables(rows, "H100-80GB")["m"]
    assert [gang.latency_ms for gang in table.gangs(1, 1)] == [5, 9]
