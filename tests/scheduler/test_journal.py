from __future__ import annotations

from pathlib import Path

import pytest

from scheduler.core import SchedulerCore
from scheduler.journal import Header, JournalError, JournalWriter, replay
from scheduler.messages import Arrived, BatchDone, Request, Serves, WorkerUp

EVENTS = [
    WorkerUp(0, 1, 1),
    Serves(0, "m", (1000, 1100)),
    Arrived(Request(1, "m", 1, (7,), due_ns=5000, expires_ns=9000)),
    Arrived(Request(2, "m", 1)),
    BatchDone(0, 1),
]


def written(path: Path) -> Path:
    core = SchedulerCore(16)
    journal = JournalWriter(path, Header(16, "elsa"))
    for now_ns, event in enumerate(EVENTS):
        journal.write(now_ns, event, core.handle(now_ns, event))
    journal.close()
    return path


def test_a_journal_replays_to_the_same_commands(tmp_path: Path) -> None:
    assert replay(written(tmp_path / "journal")) == len(EVENTS)


def test_a_journal_cut_off_in_the_middle_of_a_line_replays_up_to_there(tmp_path: Path) -> None:
    path = written(tmp_path / "journal")
    path.write_bytes(path.read_bytes()[:-5])
    assert replay(path) == len(EVENTS) - 1


def test_another_decision_is_found_and_named(tmp_path: Path) -> None:
    path = written(tmp_path / "journal")
    path.write_text(
        path.read_text().replace('"worker_id":0,"batch_id":1,"model":"m"', '"worker_id":1,"batch_id":1,"model":"m"')
    )
    with pytest.raises(JournalError, match="line 4"):
        replay(path)


@pytest.mark.parametrize("text", ["", "not json\n", '{"max_queued":16}\n[1,2]\n'])
def test_what_is_no_journal_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "journal"
    path.write_text(text)
    with pytest.raises(JournalError):
        replay(path)
