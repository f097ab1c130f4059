"""YAML whose keys stand once each, as its specification has it (1.2.2, section 3.2.1.3); PyYAML takes the last."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.composer import ComposerError


class _UniqueKeys(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ComposerError(None, None, f"key {key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return node


def load(text: str) -> Any:
    """Raises yaml.YAMLError, also for a key that is given twice in one mapping."""
    return yaml.load(text, _UniqueKeys)
