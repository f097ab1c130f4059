"""Changes of layouts on the simulated driver: the target is reached, or the old layout is back, whatever fails."""

from __future__ import annotations

import asyncio
import os
from functools import cache
from pathlib import Path

import pynvml
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.catalog import GPU_MODELS
from partitioner.geometry import IllegalLayoutError, maximal_multisets, parse_layout
from partitioner.intent import Intent
from partitioner.nvml_errors import NvmlError
from partitioner.reconfigure import Outcome, Reconfigurer, RefusedChangeError, Result
from partitioner.tenants import Nobody
from tests.partitioner.lodgers import Machine

A100 = GPU_MODELS["A100-80GB"]


def test_a_new_layout_is_cut_and_lived_on() -> None:
    machine = Machine(layout="4g.40gb+2g.20gb+1g.10gb")
    assert machine.apply("4g.40gb+1g.10gb+1g.10gb+1g.10gb") == Outcome(Result.APPLIED)
    assert machine.layout() == ["gpu0/4g.40gb@0", "gpu0/1g.10gb@4", "gpu0/1g.10gb@5", "gpu0/1g.10gb@6"]
    machine.check()
    assert machine.apply("4g.40gb+1g.10gb+1g.10gb+1g.10gb") == Outcome(Result.UNCHANGED)


def test_several_gpus_in_one_change() -> None:
    machine = Machine("A100-80GBx2", "7g.80gb")
    assert machine.apply("3g.40gb+3g.40gb", "4g.40gb+3g.40gb").result == Result.APPLIED
    machine.check()


def test_what_a_gpu_cannot_be_is_refused_and_nothing_is_touched() -> None:
    machine = Machine()
    before = machine.layout()
    with pytest.raises(IllegalLayoutError):
        machine.apply("4g.40gb+4g.40gb")
    with pytest.raises(RefusedChangeError, match="no GPU has the UUID"):
        asyncio.run(machine.reconfigurer.apply({"GPU-none": ()}))
    assert machine.layout() == before
    machine.check()


def test_a_foreign_process_keeps_the_gpu_as_it_is() -> None:
    machine = Machine()
    machine.lodgers.pids = list  # type: ignore[method-assign]  # what runs there is not ours
    with pytest.raises(RefusedChangeError, match=f"GPU 0 is not changed: .*pid {os.getpid()}"):
        machine.apply("7g.80gb")
    machine.check()


def test_two_changes_at_once_are_one_after_the_other() -> None:
    machine = Machine(layout="7g.80gb")
    uuid = machine.uuids[0]

    async def both() -> list[Outcome]:
        layouts = ("3g.40gb+3g.40gb", "4g.40gb+3g.40gb")
        wanted = [{uuid: [each.profile for each in parse_layout(layout, A100)]} for layout in layouts]
        return list(await asyncio.gather(*(machine.reconfigurer.apply(each) for each in wanted)))

    assert [each.result for each in asyncio.run(both())] == [Result.APPLIED, Result.APPLIED]
    machine.check()


def test_when_no_worker_comes_up_the_old_layout_is_back() -> None:
    machine = Machine(layout="4g.40gb+2g.20gb+1g.10gb")
    before = machine.layout()
    machine.lodgers.rejects = {"gpu0/3g.40gb@0"}
    outcome = machine.apply("3g.40gb+3g.40gb")
    assert outcome == Outcome(Result.RESTORED, "no worker came up on gpu0/3g.40gb@0")
    assert machine.layout() == before
    machine.check()


def test_when_a_model_finds_no_home_the_old_layout_is_back() -> None:
    machine = Machine(layout="4g.40gb+2g.20gb+1g.10gb")
    before = machine.layout()
    machine.lodgers.unserved = lambda: ["llm"]  # type: ignore[method-assign]
    outcome = machine.apply("7g.80gb")
    assert outcome == Outcome(Result.RESTORED, "no slice of the new layout serves llm")
    assert machine.layout() == before


def test_what_cannot_be_restored_is_told_and_the_rest_serves() -> None:
    machine = Machine(layout="4g.40gb+2g.20gb+1g.10gb")
    machine.nvml.fail("nvmlDeviceCreateGpuInstanceWithPlacement", pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES, times=999)
    outcome = machine.apply("3g.40gb+2g.20gb+1g.10gb+1g.10gb")
    assert outcome.result == Result.NEAREST
    assert "INSUFFICIENT_RESOURCES" in outcome.reason
    assert machine.layout() == ["gpu0/4g.40gb@0"]
    machine.check()


def test_a_gpu_instance_without_compute_instance_is_found_and_removed() -> None:
    machine = Machine(layout="3g.40gb+3g.40gb")
    machine.apply("3g.40gb")
    gpu = machine.nvml.nvmlDeviceGetHandleByIndex(0)
    machine.nvml.nvmlDeviceCreateGpuInstance(gpu, A100.profile("1g.10gb").profile_id)
    assert machine.apply("3g.40gb+3g.40gb").result == Result.APPLIED
    machine.check()


# ---- every fault at every call ----

CODES = {
    "in use": pynvml.NVML_ERROR_IN_USE,
    "no room": pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES,
    "not found": pynvml.NVML_ERROR_NOT_FOUND,
    "stale": pynvml.NVML_ERROR_INVALID_ARGUMENT,
    "no permission": pynvml.NVML_ERROR_NO_PERMISSION,
    "unknown": pynvml.NVML_ERROR_UNKNOWN,
    "lost": pynvml.NVML_ERROR_GPU_IS_LOST,
}


@cache
def undisturbed(before: str, after: str) -> tuple[list[str], int]:
    """The layout that a change comes to, and how many calls it takes."""
    machine = Machine(layout=before)
    start = len(machine.nvml.calls)
    machine.apply(after)
    return machine.layout(), len(machine.nvml.calls) - start


def calls_of(before: str, after: str) -> int:
    return undisturbed(before, after)[1]


def check_fault(before: str, after: str, nth: int, code: int, *, late: bool) -> Result | None:
    """One fault at one call; None where the change was not begun."""
    machine = Machine(layout=before)
    old = machine.layout()
    target, _ = undisturbed(before, after)
    machine.nvml.fail("*", code, nth=nth, after=late)
    try:
        result: Result | None = machine.apply(after).result
    except (NvmlError, RefusedChangeError):
        result = None
    machine.nvml.fail_no_more()
    assert machine.layout() in (old, target), "neither the old layout nor the new one"
    if result is None or result == Result.RESTORED:
        assert machine.layout() == old
    if result == Result.APPLIED:
        assert machine.layout() == target
    machine.check()
    return result


@pytest.mark.parametrize("late", [False, True], ids=["before it is done", "after it is done"])
def test_a_fault_at_every_call_leaves_the_old_layout_or_the_new_one(late: bool) -> None:
    """Each call fails once, with each call another code; the next test draws all that is left out here."""
    before, after = "4g.40gb+2g.20gb+1g.10gb", "4g.40gb+1g.10gb+1g.10gb+1g.10gb"
    codes = list(CODES.values())
    every = range(1, calls_of(before, after) + 1)
    results = {check_fault(before, after, nth, codes[nth % len(codes)], late=late) for nth in every}
    assert {None, Result.APPLIED, Result.RESTORED} <= results


LAYOUTS = ["+".join(each.name for each in multiset) for multiset in maximal_multisets(A100)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
    st.integers(1, 600),
    st.sampled_from(sorted(CODES.values())),
    st.booleans(),
)
def test_any_fault_in_any_change(before: str, after: str, nth: int, code: int, late: bool) -> None:
    check_fault(before, after, nth, code, late=late)


# ---- the daemon is killed in the middle ----


class KilledError(BaseException):
    """Not an error that anybody handles: the process is gone."""


def check_kill(folder: Path, before: str, after: str, nth: int) -> str:
    machine = Machine(layout=before, folder=folder)
    old = machine.layout()
    machine.nvml.fail("*", KilledError(), nth=nth)
    try:
        machine.apply(after)
    except KilledError:
        pass
    else:
        return "finished"
    machine.nvml.fail_no_more()

    next_life = Machine(layout=before, folder=folder, empty=True)
    reconfigurer = Reconfigurer(next_life.door, Nobody(), next_life.intents)
    outcome = asyncio.run(reconfigurer.recover())
    now = next_life.layout()
    assert asyncio.run(reconfigurer.recover()) is None, "recovered twice"
    assert all(each.ci_ids for uuid in next_life.uuids for each in next_life.door.instances(uuid))
    if outcome is None or outcome.result == Result.RESTORED:
        assert now == old
        return "undone"
    assert outcome.result == Result.APPLIED
    assert sorted(name.partition("@")[0] for name in now) == sorted(f"gpu0/{name}" for name in after.split("+"))
    return "finished later"


def test_a_change_cut_off_anywhere_is_finished_or_undone_at_the_next_start(tmp_path: Path) -> None:
    before, after = "4g.40gb+2g.20gb+1g.10gb", "3g.40gb+2g.20gb+1g.10gb+1g.10gb"
    ends = []
    for nth in range(1, calls_of(before, after) + 1, 7):
        folder = tmp_path / str(nth)
        folder.mkdir()
        ends.append(check_kill(folder, before, after, nth))
    ends.append(check_kill(tmp_path, before, after, 10_000))
    assert {"undone", "finished later", "finished"} == set(ends)


def test_what_somebody_has_cut_since_is_left_alone(tmp_path: Path) -> None:
    machine = Machine(layout="7g.80gb", folder=tmp_path, empty=True)
    assert machine.intents is not None
    intent = [{machine.uuids[0]: parse_layout(layout, A100)} for layout in ("4g.40gb+2g.20gb+1g.10gb", "3g.40gb")]
    machine.intents.write(Intent(*intent))
    outcome = asyncio.run(Reconfigurer(machine.door, Nobody(), machine.intents).recover())
    assert outcome is not None
    assert outcome.reason == "somebody has cut the GPUs otherwise since; they were left as they are"
    assert machine.layout() == ["gpu0/7g.80gb@0"]


def test_a_broken_record_is_told(tmp_path: Path) -> None:
    machine = Machine(folder=tmp_path)
    assert machine.intents is not None
    machine.intents.path.write_text("{")
    with pytest.raises(ValueError, match="is not a record of a re-cut"):
        asyncio.run(machine.reconfigurer.recover())


def test_a_record_of_gpus_that_are_gone_is_no_business_of_those_that_are_here(tmp_path: Path) -> None:
    machine = Machine(folder=tmp_path)
    assert machine.intents is not None
    machine.intents.write(Intent({"GPU-gone": ()}, {"GPU-gone": parse_layout("7g.80gb", A100)}))
    before = machine.layout()
    asyncio.run(machine.reconfigurer.recover())
    assert machine.layout() == before
    assert machine.intents.path.exists(), "a daemon of those GPUs will need it"
