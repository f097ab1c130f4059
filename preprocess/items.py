"""One element, preprocessed, in memory of its own. Pure."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Item(NamedTuple):
    """`values`: in the steps' dtype, the axis that varies last. `length`: as much of that axis is no padding."""

    values: np.ndarray[Any, Any]
    length: int
