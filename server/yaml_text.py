"""YAML whose keys stand once each, as its specification has it (1.2.2, section 3.2.1.3); PyYAML takes the last."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.composer import ComposerError

# The key <<: what is merged, which YAML 1.1 lets come more than once.
_MERGE = "tag:yaml.org,2002:merge"


class _UniqueKeys(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE):
            if (key.tag, key.value) in seen:
                raise ComposerError(None, None, f"key {key.value} is given twice", key.start_mark)
            seen.add((key.tag, key.value))
        return node


def load(text: str) -> Any:
    """Raises yaml.YAMLError, also for a key that is given twice in one mapping."""
    return yaml.load(text, _UniqueKeys)
