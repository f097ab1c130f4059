"""The items of a job that are read and not yet in its ledger: how many, how large, where to read on after a crash."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from scheduler.answers import Answered
from server.job_inputs import Item
from server.job_store import Position

# What is read ahead, at most about: items, and bytes of those that are not finished.
ITEMS, BYTES = 8192, 48 * 1024 * 1024
# Of these, bytes of tensors, which are larger than what a pipeline makes them from.
READY_BYTES = 48 * 1024 * 1024
# Bytes of outputs that are not in the ledger yet, beside those of the batches that run.
OUTPUT_BYTES = 48 * 1024 * 1024
# An item that so many have overtaken goes next, whatever its bucket.
OVERTAKEN = 4 * ITEMS

# A worker that dies of a batch may have died of anything; an item is given up after so many, the last ones alone.
MOST_CRASHES = 3
GIVEN_UP = "{} workers died of batches with it, the last ones of it alone; it was not tried again"


class Window:
    """`read_to`: where the next item is that is not read yet."""

    def __init__(self) -> None:
        self.read_to = Position()
        self._order: deque[Item] = deque()  # all from the first unfinished one on
        self._ended: set[int] = set()  # of these, the finished ones
        self._items = self._bytes = self._ready_bytes = 0

    @property
    def is_full(self) -> bool:
        return self._items >= ITEMS or self._bytes - self._ready_bytes >= BYTES or self.is_ready_full

    @property
    def is_ready_full(self) -> bool:
        return self._ready_bytes >= READY_BYTES

    def add(self, item: Item) -> None:
        """It was read."""
        self._order.append(item)
        self._items += 1
        self._bytes += item.nbytes

    def ready(self, item: Item, before: int) -> None:
        """It is tensors now; `before`: its bytes until then."""
        self._bytes += item.nbytes - before
        self._ready_bytes += item.nbytes

    def ended(self, items: Iterable[Item], *, were_ready: bool) -> None:
        """They are finished: what they were made of is let go."""
        for item in items:
            self._ended.add(item.number)
            self._bytes -= item.nbytes
            self._ready_bytes -= item.nbytes if were_ready else 0
            item.parts = ()

    def put_down(self, items: int) -> None:
        """So many are in the ledger."""
        self._items -= items

    def position(self) -> Position:
        """Of the first item that is not finished."""
        while self._order and self._order[0].number in self._ended:
            self._ended.discard(self._order.popleft().number)
        return Position(self._order[0].number, self._order[0].offset) if self._order else self.read_to

    def overtaken(self) -> Item | None:
        """One that was left behind for too long."""
        if self._order and self._order[-1].number - self._order[0].number >= OVERTAKEN:
            return self._order[0]
        return None


class Waiting:
    """Items that are tensors and wait for a slice, by bucket; and those that have to run by themselves."""

    def __init__(self) -> None:
        self._of: dict[tuple[int, ...], deque[Item]] = {}
        self.alone: deque[Item] = deque()

    def add(self, item: Item) -> None:
        self._of.setdefault(item.bucket, deque()).append(item)

    def put_back(self, items: Sequence[Item]) -> None:
        """A batch that did not run, to where it was."""
        to = self.alone if items[0].alone else self._of.setdefault(items[0].bucket, deque())
        to.extendleft(reversed(items))

    def tried(self, items: Sequence[Item], error: str, *, crashed: bool) -> list[tuple[Item, str]]:
        """A batch that failed: one of them may be at fault, each has to show by itself. Returns whom not, and why."""
        given_up = []
        for item in items:
            item.alone = True
            item.crashes += crashed
            if len(items) > 1 or (crashed and item.crashes < MOST_CRASHES):
                self.alone.append(item)
            else:
                given_up.append((item, GIVEN_UP.format(item.crashes) if crashed else error))
        return given_up

    def regroup(self, bucket_of: Callable[[Item], tuple[int, ...]]) -> None:
        """There are other buckets now. Of each the items stay in their order."""
        items = sorted((item for waiting in self._of.values() for item in waiting), key=lambda item: item.number)
        self._of = {}
        for item in items:
            item.bucket = bucket_of(item)
            self.add(item)

    def counts(self) -> dict[tuple[int, ...], int]:
        return {bucket: len(items) for bucket, items in self._of.items()}

    def take(self, bucket: tuple[int, ...], most: int) -> list[Item]:
        """The first ones."""
        waiting = self._of[bucket]
        items = [waiting.popleft() for _ in range(min(most, len(waiting)))]
        if not waiting:
            del self._of[bucket]
        return items

    def is_next(self, item: Item) -> bool:
        """Of its bucket."""
        waiting = self._of.get(item.bucket)
        return bool(waiting) and waiting is not None and waiting[0] is item


Outcomes = list[tuple[list[Item], Answered | str]]


class Finished:
    """What became of items, and is not in the ledger yet: the outputs of their batch, or what is wrong with them."""

    def __init__(self) -> None:
        self._outcomes: Outcomes = []
        self._bytes = 0  # also of what is being put down

    @property
    def is_full(self) -> bool:
        """Nothing more is to be run before some are put down."""
        return self._bytes >= OUTPUT_BYTES

    def add(self, items: list[Item], outcome: Answered | str) -> None:
        self._outcomes.append((items, outcome))
        self._bytes += _nbytes(outcome)

    def take(self) -> Outcomes:
        """To put it down; all of it."""
        taken, self._outcomes = self._outcomes, []
        return taken

    def put_back(self, taken: Outcomes) -> None:
        """That could not be."""
        self._outcomes = taken + self._outcomes

    def put_down(self, taken: Outcomes) -> int:
        """Returns how many items that were."""
        self._bytes -= sum(_nbytes(outcome) for _, outcome in taken)
        return sum(len(items) for items, _ in taken)


def _nbytes(outcome: Answered | str) -> int:
    return outcome.nbytes if isinstance(outcome, Answered) else 0


class Sent:
    """Batches that are on their way. `on`: how many, by worker."""

    def __init__(self) -> None:
        self.on: Counter[int] = Counter()
        self._batches: dict[int, tuple[int, list[Item]]] = {}
        self._cancel: dict[int, Callable[[], object]] = {}
        self._numbers = 0

    def add(self, worker_id: int, items: list[Item]) -> int:
        """Returns its number."""
        self._numbers += 1
        self.on[worker_id] += 1
        self._batches[self._numbers] = worker_id, items
        return self._numbers

    def sent(self, number: int, cancel: Callable[[], object]) -> None:
        if number in self._batches:  # it may have been refused meanwhile
            self._cancel[number] = cancel

    def ended(self, number: int) -> tuple[int, list[Item]] | None:
        """Its worker and items; None if that was told before."""
        if number not in self._batches:
            return None
        self._cancel.pop(number, None)
        worker_id, items = self._batches.pop(number)
        self.on[worker_id] -= 1
        return worker_id, items

    def take_back(self) -> None:
        """All: their ends are nobody's business any more."""
        for cancel in list(self._cancel.values()):
            cancel()
        self._batches.clear()
        self._cancel.clear()
