"""How fast a job goes, what bounds that, and which workers it had better leave alone. Pure; times are in s."""

from __future__ import annotations

from collections import deque

# What is told is of about so long.
TAU_S = 10.0
# Where slices wait for inputs more often than that, it is these that the end waits for.
STARVED = 0.5
# After an error of the disk a job waits so long, and twice as long after each time that is as bad, up to the other.
FULL_S, MOST_FULL_S = 10.0, 300.0
# Of a bucket's factor: so much of the last batch.
WEIGHT = 0.2


class Pace:
    """Of finished items. To be started before it counts."""

    def __init__(self) -> None:
        self._per_s = self._starved = self._at_s = 0.0

    def start(self, at_s: float) -> None:
        self._at_s = at_s

    def count(self, done: int, at_s: float, *, starved: bool) -> None:
        """So many more are finished. `starved`: slices have less to do than they could."""
        took_s, self._at_s = max(at_s - self._at_s, 1e-3), at_s
        weight = min(took_s / TAU_S, 1.0) if self._per_s else 1.0
        self._per_s += weight * (done / took_s - self._per_s)
        self._starved += weight * (starved - self._starved)

    def per_s(self, at_s: float) -> float:
        """As it would be if nothing more was finished now."""
        return self._per_s * (1 - min((at_s - self._at_s) / TAU_S, 1.0))

    def ends_s(self, left: int, planned_s: float, at_s: float) -> float:
        """From now. `planned_s`: by what slices can do; where they wait for inputs, it goes on as it does."""
        per_s = self.per_s(at_s)
        return max(planned_s, left / per_s) if self._starved > STARVED and per_s > 0 else planned_s


class Casualties:
    """Workers that died of batches of jobs. One that did so too often is left alone until that is a while ago."""

    def __init__(self, most: int, window_s: float) -> None:
        """Not one more than so many deaths within the window."""
        self._most, self._window_s = most, window_s
        self._died_s: dict[int, deque[float]] = {}

    def died(self, worker_id: int, at_s: float) -> None:
        self._died_s.setdefault(worker_id, deque(maxlen=self._most)).append(at_s)

    def spared_s(self, worker_id: int, at_s: float) -> float:
        """For how long it is left alone; 0: it is not."""
        died_s = self._died_s.get(worker_id)
        if died_s is None or len(died_s) < self._most:
            return 0.0
        return max(died_s[0] + self._window_s - at_s, 0.0)


class Patience:
    """With what fails though nothing is seen to be in its way, by job: a disk that takes nothing and shows free room,
    preprocessing that does not start. To try again costs work that cannot be kept."""

    def __init__(self) -> None:
        self._waits: dict[str, tuple[float, float, int]] = {}  # how long, until when, items that were kept before

    def failed(self, job_id: str, done: int, at_s: float) -> None:
        """Twice as long as the last time, unless more could be kept meanwhile. `done`: items that are kept."""
        wait_s, _, before = self._waits.get(job_id, (0.0, 0.0, done))
        wait_s = min(2 * wait_s, MOST_FULL_S) if wait_s and done == before else FULL_S
        self._waits[job_id] = wait_s, at_s + wait_s, done

    def left_s(self, job_id: str, at_s: float) -> float:
        """Until it may be tried again; 0: now."""
        return max(self._waits.get(job_id, (0.0, at_s, 0))[1] - at_s, 0.0)

    def forget(self, job_id: str) -> None:
        """It has ended, or somebody wants it now."""
        self._waits.pop(job_id, None)


class Factors(dict[tuple[int, ...], float]):
    """By length bucket: its batches' times over those that were expected by the table."""

    def learn(self, bucket: tuple[int, ...], ratio: float) -> None:
        """One batch more; `ratio`: its time over what was expected of it, with this factor."""
        ratio = min(max(ratio, 0.1), 10.0)
        self[bucket] = min(max(self.get(bucket, 1.0) * (1 + WEIGHT * (ratio - 1)), 0.02), 50.0)
