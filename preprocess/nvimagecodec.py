"""nvImageCodec: JPEG on the hardware engines of a GPU, where its slice has them, and on its cores.

Not run on a GPU yet: what is tested is its CPU backend, through the same code. Its interface is documented at
https://docs.nvidia.com/cuda/nvimagecodec/py_api.html. It tries the hardware engine, then CUDA, by itself. It takes no
memory but its own, so that is marked as well, and copied from.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from nvidia import nvimgcodec

from preprocess.cards import is_marked, mark, shape_of
from preprocess.decoders import Picture
from preprocess.errors import BadInputError

# libjpeg interpolates chroma; so must this, or edges of colours differ by up to 12 levels.
OPTIONS = ":fancy_upsampling=1"
# Of an image's memory, which is taken once: 50 MB. Larger pictures go to the CPU.
MOST_SIDE = 4096
# Images that a thread has, and so the most that it decodes at once.
AT_ONCE = 4


class _Slot(NamedTuple):
    """An image of nvImageCodec's, which it writes again and again, and all of the image's memory."""

    image: Any
    memory: torch.Tensor


class NvImageCodec:
    """A Card. Each thread has a decoder and images of its own. Regions of interest are not used: 0.9.0 dies of them."""

    def __init__(self, *, on_gpu: bool = True) -> None:
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self._on_gpu = on_gpu
        self._local = threading.local()

    def takes(self, picture: Picture) -> bool:
        """JPEGs of three channels: the rest is rare, and exact on the CPU."""
        header = picture.header
        return header.components == 3 and not picture.grey and header.width * header.height <= MOST_SIDE**2

    def synchronise(self) -> None:
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()

    def decode_into(self, pictures: Sequence[Picture], places: Sequence[torch.Tensor]) -> list[BadInputError | None]:
        errors: list[BadInputError | None] = []
        for begin in range(0, len(pictures), AT_ONCE):
            errors += self._decode(pictures[begin : begin + AT_ONCE], places[begin : begin + AT_ONCE])
        return errors

    def _decode(self, pictures: Sequence[Picture], places: Sequence[torch.Tensor]) -> list[BadInputError | None]:
        slots = self._slots()[: len(pictures)]
        shapes = [shape_of(picture) for picture in pictures]
        views = [
            slot.memory[: height * width * channels].view(height, width, channels)
            for slot, (height, width, channels) in zip(slots, shapes, strict=True)
        ]
        for view in views:
            mark(view)
        self.synchronise()
        decoded = self._run([picture.data for picture in pictures], [slot.image for slot in slots])
        errors: list[BadInputError | None] = []
        for image, shape, view, place in zip(decoded, shapes, views, places, strict=True):
            written = image is not None and tuple(image.shape) == shape and not is_marked(view)
            if written:
                place.copy_(view)
            errors.append(None if written else BadInputError("a picture that nvImageCodec did not decode"))
        self.synchronise()  # its images are written anew by the next call
        return errors

    def _slots(self) -> list[_Slot]:
        """Made by decoding something large: it takes no memory but what it has made itself."""
        slots: list[_Slot] | None = getattr(self._local, "slots", None)
        if slots is None:
            large = simplejpeg.encode_jpeg(np.zeros((MOST_SIDE, MOST_SIDE, 3), np.uint8))
            slots = [_Slot(image, self._memory(image)) for image in self._run([large] * AT_ONCE, None)]
            self._local.slots = slots
        return slots

    def _run(self, streams: Sequence[bytes], images: list[Any] | None) -> list[Any]:
        """None for what it cannot decode."""
        parameters = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)
        codes = [nvimgcodec.CodeStream(stream) for stream in streams]
        stream = torch.cuda.current_stream().cuda_stream if self._on_gpu else 0
        decoded: list[Any] = self._decoder().decode(codes, images=images, params=parameters, cuda_stream=stream)
        return decoded

    def _decoder(self) -> Any:
        if not hasattr(self._local, "decoder"):
            if self._on_gpu:
                self._local.decoder = nvimgcodec.Decoder(options=OPTIONS)
            else:
                self._local.decoder = nvimgcodec.Decoder(
                    device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
                    max_num_cpu_threads=1,
                    backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
                    options=OPTIONS,
                )
        return self._local.decoder

    def _memory(self, image: Any) -> torch.Tensor:
        if self._on_gpu:
            return torch.as_tensor(image, device=self.device).flatten()
        return torch.from_numpy(np.asarray(image)).flatten()


def open_card() -> NvImageCodec:
    """Raises RuntimeError where there is no GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError("there is no GPU with CUDA")
    return NvImageCodec()
