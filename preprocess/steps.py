"""The steps that a pipeline may declare for pictures, sound and text, and what they make. Pure."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from preprocess import framing
from preprocess.gate import MAX_PIXELS

# What a preset sets; whatever is written beside it wins. imagenet-eval: how torchvision evaluates its classifiers.
IMAGE_PRESETS: dict[str, dict[str, Any]] = {
    "imagenet-eval": {
        "mode": "RGB",
        "resize": 256,
        "crop": 224,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
}
# Of a side of the picture that a model takes.
MAX_SIDE = 8192


class ImageSteps(BaseModel):
    """Decode, convert to `mode`, turn by EXIF if `exif`, resize, crop in the middle, divide, normalise.

    `resize`: the short side in pixels, the other in proportion; or else `size`: height and width, whatever the
    proportions. `interpolation`: bilinear or bicubic, antialiased; area: each pixel the mean of what it covers. `crop`:
    height and width, or one number for both. Levels 0 to 255 become (level / divide_by - mean) / std, or stay as they
    are if `dtype` is UINT8. `dct_scaling`: decode large JPEGs at a fraction of their size, not below twice what is
    resized to: quicker, and off by up to 12 levels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    preset: Literal["imagenet-eval"] | None = None
    mode: Literal["L", "RGB"] = "RGB"
    exif: bool = False
    resize: int | None = Field(None, ge=1, le=MAX_SIDE)
    size: tuple[int, int] | None = None
    interpolation: Literal["bilinear", "bicubic", "area"] = "bilinear"
    crop: int | tuple[int, int] | None = None
    divide_by: float = Field(255.0, gt=0)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: Literal["FP32", "FP16", "UINT8"] = "FP32"
    layout: Literal["CHW", "HWC"] = "CHW"
    max_pixels: int = Field(MAX_PIXELS, ge=1)
    dct_scaling: bool = False

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        preset = IMAGE_PRESETS.get(str(given.get("preset"))) if isinstance(given, dict) else None
        if preset is None:
            return given
        drop = {"resize"} if given.get("size") is not None else set()
        return {name: value for name, value in preset.items() if name not in drop} | given

    @model_validator(mode="after")
    def _makes_sense(self) -> ImageSteps:
        if (self.size is None) == (self.resize is None):
            raise ValueError("give either resize, of the short side, or size: [height, width]")
        sides = (*(self.size or ()), *(_both(self.crop) or ()))
        if any(not 1 <= side <= MAX_SIDE for side in sides):
            raise ValueError(f"sizes are 1 to {MAX_SIDE} pixels")
        if self.resize is not None and self.crop is None:
            raise ValueError("resize leaves pictures of different widths; give a crop as well, or size instead")
        height, width = self.size or (self.resize, self.resize)
        rows, columns = self.frame
        if rows > (height or 0) or columns > (width or 0):
            raise ValueError(f"crop {rows} x {columns} is larger than what is resized to, {height} x {width}")
        self._check_levels()
        return self

    def _check_levels(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values, mode {self.mode} takes {self.channels}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("std must be above 0")
        if self.dtype == "UINT8" and (self.mean is not None or "divide_by" in self.model_fields_set):
            raise ValueError("UINT8 is for levels as they are, without divide_by, mean and std")

    @property
    def channels(self) -> int:
        return 1 if self.mode == "L" else 3

    @property
    def frame(self) -> tuple[int, int]:
        """Height and width of what is left after the crop."""
        return _both(self.crop) or self.size or (0, 0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one item."""
        return (self.channels, *self.frame) if self.layout == "CHW" else (*self.frame, self.channels)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture is resized to, before the crop."""
        if self.resize is not None:
            return framing.resized(width, height, self.resize)
        rows, columns = self.size or self.frame
        return columns, rows


def _both(side: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (side, side) if isinstance(side, int) else side


# Both as their models' own feature extractors have it: NeMo's AudioToMelSpectrogramPreprocessor as of its FastConformer
# models, and Whisper's log_mel_spectrogram (large-v3 has mels: 128).
AUDIO_PRESETS: dict[str, dict[str, Any]] = {
    "nemo-80": {
        "mels": 80,
        "fft": 512,
        "window": 400,
        "periodic": False,
        "pad": "constant",
        "preemphasis": 0.97,
        "log": "ln",
        "per_feature": True,
    },
    "whisper": {
        "mels": 80,
        "fft": 400,
        "window": 400,
        "periodic": True,
        "pad": "reflect",
        "preemphasis": 0.0,
        "log": "whisper",
        "per_feature": False,
        "seconds": 30.0,
    },
}


class AudioSteps(BaseModel):
    """Decode, mix to mono, resample to `sample_rate`, log-mel with Slaney's filters, normalise.

    `fft`, `window` and `hop` in samples; `periodic`: of the Hann window; `pad`: what stands beyond both ends. `log`: ln
    of energy + 2^-24, or whisper's: log10 of at least 1e-10, at most 8 below its maximum, then (x + 4) / 4.
    `per_feature`: each mel has mean 0 and deviation 1 (of N - 1) over the clip. `seconds`: silence fills up to so long,
    for models that take clips of one length. Longer clips than `seconds` or `max_seconds` are refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    preset: Literal["nemo-80", "whisper"] | None = None
    sample_rate: int = Field(16_000, ge=1000, le=192_000)
    mels: int = Field(80, ge=1, le=1024)
    fft: int = Field(512, ge=16, le=1 << 16)
    window: int = Field(400, ge=2)
    hop: int = Field(160, ge=1)
    periodic: bool = True
    pad: Literal["constant", "reflect"] = "constant"
    preemphasis: float = Field(0.0, ge=0, lt=1)
    low_hz: float = Field(0.0, ge=0)
    high_hz: float | None = None
    log: Literal["ln", "whisper"] = "ln"
    per_feature: bool = False
    seconds: float | None = Field(None, gt=0, le=3600)
    max_seconds: float = Field(120.0, gt=0, le=3600)
    dtype: Literal["FP32", "FP16"] = "FP32"

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        preset = AUDIO_PRESETS.get(str(given.get("preset"))) if isinstance(given, dict) else None
        return given if preset is None else preset | given

    @model_validator(mode="after")
    def _makes_sense(self) -> AudioSteps:
        if self.window > self.fft:
            raise ValueError(f"window {self.window} is longer than fft {self.fft}")
        if not self.low_hz < self.highest_hz <= self.sample_rate / 2:
            raise ValueError(
                f"low_hz {self.low_hz} to high_hz {self.highest_hz} is not within 0 to half the sample_rate"
            )
        if self.least_samples > self.most_samples:
            raise ValueError("seconds and max_seconds leave no clip that is long enough")
        return self

    @property
    def highest_hz(self) -> float:
        return self.sample_rate / 2 if self.high_hz is None else self.high_hz

    @property
    def most_samples(self) -> int:
        return int((self.seconds or self.max_seconds) * self.sample_rate)

    @property
    def least_samples(self) -> int:
        """A deviation takes two frames, a reflection half a window's samples and one; and nothing is no clip."""
        if self.seconds is not None:
            return 1
        of_pad = self.fft // 2 + 1 if self.pad == "reflect" else 1
        return max(self.hop * (2 if self.per_feature else 1), of_pad)

    def frames_of(self, samples: int) -> int:
        """How many there are of a clip, or of `seconds`."""
        return (samples if self.seconds is None else self.most_samples) // self.hop

    @property
    def shape(self) -> tuple[int, int]:
        """Of one item: mels, frames; -1 where clips differ."""
        return self.mels, -1 if self.seconds is None else self.frames_of(0)


class TextSteps(BaseModel):
    """UTF-8 into token ids. `tokenizer`: a tokenizer.json of Hugging Face's, beside serving.yaml.

    Texts of more than `max_tokens`, special ones included, are refused, or, with `truncate`, cut.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokenizer: str
    max_tokens: int = Field(512, ge=1, le=1 << 20)
    truncate: bool = False

    @property
    def dtype(self) -> Literal["INT64"]:
        return "INT64"

    @property
    def shape(self) -> tuple[int]:
        return (-1,)
