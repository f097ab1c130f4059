"""Long benchmarks that may be stopped: each case runs in a process of its own, and is kept at once, a line of JSON."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import scheduler

Row = dict[str, Any]
Case = TypeVar("Case")  # a frozen dataclass of plain values, one of them the policy's name

SHARED = ("core", "domain", "estimates", "batching", "simulator", "mix", "workload")
OWN = {"pool": ("admission", "blocking", "lanes", "promises", "rates", "shares"), "elsa": (), "marginal": ()}


@cache
def code_of(policy: str) -> str:
    """Names the code that a policy's figures depend on; comments do not count."""
    own = (policy, *OWN.get(policy, ("central",)))
    folder = Path(scheduler.__file__).parent
    digest = hashlib.sha256()
    for name in (*SHARED, *(f"policies/{each}" for each in own)):
        digest.update(ast.dump(ast.parse((folder / f"{name}.py").read_text())).encode())
    return digest.hexdigest()[:12]


class Kept(Generic[Case]):
    """Rows by case; what other code has measured, or with other `settings`, is left aside.

    Reads `paths`, and appends to the first.
    """

    def __init__(self, kind: type[Case], paths: Sequence[Path], settings: Row, policies: Iterable[str]) -> None:
        self._kind, self._path, self._settings = kind, paths[0], settings
        self._policies = frozenset(policies)
        self.by_case: dict[Case, Row] = {}
        self._others: dict[tuple[str, str], dict[Case, Row]] = {}  # by policy and code
        for path in reversed(paths):
            if path.exists():
                for line in path.read_text().splitlines():
                    self._add(json.loads(line))

    def _add(self, row: Row) -> None:
        if all(row.get(name) == value for name, value in self._settings.items()) and row["policy"] in self._policies:
            case = self._kind(**{each.name: row[each.name] for each in fields(self._kind)})  # type: ignore[arg-type]
            if row["code"] == code_of(row["policy"]):
                self.by_case[case] = row
            else:
                self._others.setdefault((row["policy"], row["code"]), {})[case] = row

    def take_over(self, measure: Callable[[Case], Row], count: int) -> Iterator[str]:
        """What older code has measured counts, if `count` figures, drawn by chance, are the same when measured anew.

        From the code before on backwards, until some differ.
        """
        others: set[str] = set()  # policies that have changed since
        for (policy, code), rows in reversed(self._others.items()):
            if policy in others:
                continue
            missing = [case for case in rows if case not in self.by_case]
            drawn = random.Random(code).sample(missing, min(count, len(missing)))
            differ = [case for case in drawn if _figures(measure(case)) - _figures(rows[case])]
            if differ:
                others.add(policy)
            for case in [] if differ else missing:
                self.keep(case, {name: value for name, value in rows[case].items() if name not in asdict(case)})  # type: ignore[call-overload]
            yield f"{policy}, {code}: {len(differ)} of {len(drawn)} differ, {len(missing)} figures" + (
                " not taken over" if differ else ""
            )

    def keep(self, case: Case, figures: Row) -> None:
        of_case = asdict(case)  # type: ignore[call-overload]
        row = of_case | figures | self._settings | {"code": code_of(of_case["policy"])}
        self.by_case[case] = row
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[Row]:
        return list(self.by_case.values())

    def write(self, path: Path) -> None:
        """All rows, in an order that does not depend on when they were measured."""
        names = [each.name for each in fields(self._kind)]  # type: ignore[arg-type]
        rows = sorted(self.by_case.values(), key=lambda row: [str(row[name]) for name in names])
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _figures(row: Row) -> set[str]:
    """All but how long it took."""
    return {f"{name} {value}" for name, value in row.items() if name != "seconds"}


def measure_all(
    cases: Sequence[Case],
    kept: Kept[Case],
    work: Callable[[Case], Callable[[], Row]],
    jobs: int,
    until: float,
    what: str,
) -> None:
    """Measures those that are not kept, in `jobs` processes; begins none after `until` (time.monotonic).

    `work` is asked when a case begins; what it returns must be picklable.
    """
    wanted = [case for case in cases if case not in kept.by_case]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ProcessPoolExecutor(jobs) as pool, Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=len(wanted))
        running: dict[Future[Row], Case] = {}
        todo = iter(wanted)
        while True:
            while len(running) <= jobs and time.monotonic() < until and (case := next(todo, None)) is not None:
                running[pool.submit(work(case))] = case
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                kept.keep(running.pop(future), future.result())
                progress.advance(task)
