"""YAML whose keys stand once each, as its specification has it (1.2.2, section 3.2.1.3); PyYAML takes the last.

What PyYAML raises of Python's own errors, such as of a date that is none, is an error of the text, too.
"""

from __future__ import annotations

from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

# The key <<: what is merged, which YAML 1.1 lets come more than once.
_MERGE = "tag:yaml.org,2002:merge"
# What cannot be turned into what its form or its tag says, such as 2024-13-45 or !!int "".
_PYTHONS_OWN = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
SHOWN_CHARS = 40


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE):
            if (key.tag, key.value) in seen:
                raise ComposerError(None, None, f"key {key.value} is given twice", key.start_mark)
            seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except _PYTHONS_OWN as error:
            value = node.value if isinstance(node, yaml.ScalarNode) else node.tag
            problem = f"{value[:SHOWN_CHARS]!r} cannot be read: {error}"
            raise ConstructorError(None, None, problem, node.start_mark) from error


def load(text: str) -> Any:
    """Raises yaml.YAMLError, also for a key that is given twice in one mapping."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.MarkedYAMLError(problem="it is nested too deeply") from None
