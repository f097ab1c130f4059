"""Where a picture's frame lies: sizes and offsets exactly as torchvision computes them. Pure.

Off by one pixel, a picture differs by a hundred levels at its edges: torchvision truncates the long side, and rounds
the crop's offset half to even; other libraries do neither.
"""

from __future__ import annotations


def resized(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height once the short side is `short_side`, as torchvision.transforms.Resize(int)."""
    if width <= height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side


def centred(size: int, crop: int) -> int:
    """Offset of a crop in the middle of an axis, as torchvision.transforms.CenterCrop; `crop` <= `size`."""
    return round((size - crop) / 2.0)
