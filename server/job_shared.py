"""What all batch jobs have together."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from scheduler.elastic import Elastic
from server.job_pace import Casualties, Patience
from server.job_preparing import JobPreparer
from server.job_supply import Supply
from server.service import InferenceService


class Shared(NamedTuple):
    """`tally`: finished items, by model and outcome."""

    service: InferenceService
    elastic: Elastic
    supply: Supply
    preparer: JobPreparer
    casualties: Casualties
    patience: Patience
    tally: Counter[tuple[str, str]]
