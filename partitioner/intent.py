"""What a re-cut is about to do, on disk while it does it, so that the next start can finish or undo it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partitioner.geometry import GpuModel, IllegalLayoutError, Layout, PlacedProfile, Placement


@dataclass(frozen=True, slots=True)
class Intent:
    """The layouts of each GPU, by UUID, before the change and after it."""

    before: Mapping[str, Layout]
    target: Mapping[str, Layout]


class IntentFile:
    """One file; it exists while a change is under way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, intent: Intent) -> None:
        """Durable when it returns. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        with new.open("w") as file:
            json.dump({"before": _plain(intent.before), "target": _plain(intent.target)}, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)

    def read(self, models: Mapping[str, GpuModel]) -> Intent | None:
        """The change that was under way, on those GPUs that are still there. Raises ValueError for a broken file."""
        try:
            data = json.loads(self.path.read_text())
            return Intent(_layouts(data["before"], models), _layouts(data["target"], models))
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, json.JSONDecodeError, IllegalLayoutError) as error:
            raise ValueError(
                f"{self.path} is not a record of a re-cut ({error}); check the layout and remove it"
            ) from error

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


def _plain(layouts: Mapping[str, Layout]) -> dict[str, Any]:
    return {
        uuid: [[each.profile.name, each.placement.start, each.placement.size] for each in layout]
        for uuid, layout in layouts.items()
    }


def _layouts(data: Mapping[str, Any], models: Mapping[str, GpuModel]) -> dict[str, Layout]:
    return {
        uuid: tuple(PlacedProfile(models[uuid].profile(name), Placement(start, size)) for name, start, size in layout)
        for uuid, layout in data.items()
        if uuid in models
    }
