from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.arena import MIN_BLOCK, Arena, ArenaFullError

SIZE = 64 * 1024


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(0, SIZE), st.tuples(st.integers(0, 1000))), max_size=200))
def test_slots_never_overlap_and_all_memory_comes_back(steps: list[int | tuple[int]]) -> None:
    """An int allocates that many bytes, a tuple frees one of the slots."""
    arena = Arena(SIZE)
    slots: dict[int, int] = {}
    for step in steps:
        if isinstance(step, tuple):
            if slots:
                offset = sorted(slots)[step[0] % len(slots)]
                del slots[offset]
                arena.free(offset)
            continue
        try:
            offset = arena.allocate(step)
        except ArenaFullError:
            continue
        assert 0 <= offset <= SIZE - step
        assert offset % MIN_BLOCK == 0
        for other, size in slots.items():
            assert offset + step <= other or other + size <= offset
        slots[offset] = step
    for offset in slots:
        arena.free(offset)
    assert arena.used == 0
    assert arena.allocate(SIZE) == 0, "freed blocks must join again"
    arena.close()


def test_full_is_an_error_and_nothing_is_lost_by_it() -> None:
    arena = Arena(1024)
    offsets = [arena.allocate(256) for _ in range(4)]
    with pytest.raises(ArenaFullError, match="1024 of 1024 are in use"):
        arena.allocate(1)
    for offset in offsets:
        arena.free(offset)
    assert arena.allocate(1024) == 0
    arena.close()


def test_freeing_twice_is_an_error() -> None:
    arena = Arena(1024)
    offset = arena.allocate(1)
    arena.free(offset)
    with pytest.raises(KeyError):
        arena.free(offset)
    arena.close()


@pytest.mark.parametrize("size", [0, 100, 1000])
def test_the_size_must_be_a_power_of_two(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        Arena(size)
