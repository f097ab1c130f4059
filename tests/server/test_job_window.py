"""Where the items of a job are between reading and the ledger."""

from __future__ import annotations

from server.job_inputs import Item
from server.job_window import Waiting


def test_an_item_that_has_to_run_by_itself_does_so_though_it_was_refused_meanwhile() -> None:
    waiting = Waiting()
    waiting.tried([Item(0, 0, (3,)), Item(1, 0, (3,))], "raised", crashed=False)
    waiting.put_back([waiting.alone.popleft()])
    assert [item.number for item in waiting.alone] == [0, 1]
    assert waiting.counts() == {}
