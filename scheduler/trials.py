"""First runs of a model that a worker has loaded: how long batches take, and whether padding changes answers."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from scheduler.backends import Array, Backend, ModelLoadError
from scheduler.lengths import ByLength, Lengths, Points, shortest, to_measure
from scheduler.tensors import DATATYPES, InputLayout, Signature

# Measuring a model at load takes at most about this long; where it has lengths, so long for each two of them.
MEASURE_SECONDS = 0.4
# Of outputs of about 1, alone and padded: another order of the same additions.
PADDING_TOLERANCE = 1e-3


def measure(backend: Backend) -> Points:
    """(batch, ms) points on this device: medians of a few runs each, on zeros. Raises ModelLoadError."""
    return _points(backend, backend.signature.sample_dims, None, MEASURE_SECONDS)


def measure_lengths(backend: Backend, lengths: Lengths) -> ByLength:
    """The same, of batches padded to several lengths. Raises ModelLoadError, also where padding changes an answer."""
    check(backend.signature, lengths)
    measured = to_measure(lengths, shortest(backend.signature))
    try:
        _check_padding(backend, lengths, measured[0], measured[-1])
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"a run at length {measured[-1]} failed: {type(error).__name__}: {error}") from error
    return tuple(
        (length, _points(backend, _dims(backend.signature, length), lengths, MEASURE_SECONDS / 2))
        for length in measured
    )


def check(signature: Signature, lengths: Lengths) -> None:
    """Does the model have what the lengths ask for? Raises ModelLoadError."""
    if signature.max_batch == 0:
        raise ModelLoadError("lengths are for models that batch, and this one has no batch dimension")
    if not any(-1 in spec.dims for spec in signature.inputs):
        raise ModelLoadError("lengths are for models with an input dimension that varies, and this one has none")
    inputs = {spec.name: spec for spec in signature.inputs}
    for key, name in (("length", lengths.length), ("mask", lengths.mask)):
        if name and name not in inputs:
            raise ModelLoadError(f"lengths.{key} is {name!r}, but the model's inputs are {', '.join(inputs)}")
        if name and (inputs[name].datatype != "INT64" or inputs[name].dims not in ((), (1,), (-1,))):
            spec = inputs[name]
            raise ModelLoadError(f"lengths.{key}: input {name} is {spec.datatype} {list(spec.dims)}, expected INT64")
    if lengths.longest < shortest(signature):
        raise ModelLoadError(f"lengths.longest is {lengths.longest}; the model takes {shortest(signature)} or more")


def _dims(signature: Signature, length: int) -> tuple[int, ...]:
    return (length,) * sum(spec.dims.count(-1) for spec in signature.inputs)


def sample(
    signature: Signature, batch: int, dims: tuple[int, ...], lengths: Lengths | None, length: int
) -> list[Array]:
    """Zeros of these dims; what is told of lengths says that they are `length`."""
    places = InputLayout(signature).slot(max(batch, signature.min_batch), dims).places
    arrays = []
    for spec, place in zip(signature.inputs, places, strict=True):
        array = np.zeros(place.shape, DATATYPES[spec.datatype].numpy)
        if lengths is not None and spec.name == lengths.length:
            array[:] = length
        elif lengths is not None and spec.name == lengths.mask:
            array[..., :length] = 1
        arrays.append(array)
    return arrays


def _points(backend: Backend, dims: tuple[int, ...], lengths: Lengths | None, seconds: float) -> Points:
    signature = backend.signature
    largest = max(signature.max_batch, 1)
    batches = sorted({largest, *(1 << n for n in range(largest.bit_length()))})
    deadline = time.monotonic() + seconds
    points: list[tuple[int, float]] = []
    for batch in batches:
        inputs = sample(signature, batch, dims, lengths, dims[0] if dims else 0)
        try:
            points.append((batch, _median_ms(backend, inputs, seconds / len(batches))))
        except Exception as error:  # a model that cannot run on zeros of its own shape is broken
            raise ModelLoadError(f"a first run at batch {batch} failed: {type(error).__name__}: {error}") from error
        if time.monotonic() > deadline and len(points) > 1:
            break  # the rest is extrapolated along the last two points
    return tuple(points)


def _median_ms(backend: Backend, inputs: list[Array], seconds: float) -> float:
    backend.finish(backend.start(inputs))  # the first run of a shape pays for caches and buffers
    times: list[float] = []
    while not times or (sum(times) < seconds and len(times) < 50):
        begin = time.perf_counter()
        backend.finish(backend.start(inputs))
        times.append(time.perf_counter() - begin)
    return 1e3 * sorted(times)[len(times) // 2]


def _check_padding(backend: Backend, lengths: Lengths, short: int, long: int) -> None:
    """Runs noise of `short`, alone and padded to `long`. Raises ModelLoadError where the answers differ."""
    signature = backend.signature
    alone = sample(signature, 1, _dims(signature, short), lengths, short)
    noise = np.random.default_rng(0)
    for array in alone:
        if array.dtype.kind == "f":
            array[:] = noise.standard_normal(array.shape)
    padded = sample(signature, 1, _dims(signature, long), lengths, short)
    for small, large in zip(alone, padded, strict=True):
        large[tuple(map(slice, small.shape))] = small
    answers = (backend.finish(backend.start(inputs)) for inputs in (alone, padded))
    for spec, one, other in zip(signature.outputs, *answers, strict=True):
        cut = other[(slice(None), *(slice(short if dim == -1 else None) for dim in spec.dims))]
        if one.shape != cut.shape or (-1 in spec.dims and not _varies_with(spec.dims, other.shape, long)):
            raise ModelLoadError(
                f"output {spec.name} has shape {list(one.shape)} at length {short} and {list(other.shape)} at {long}; "
                f"what varies in an output must be as long as the inputs, or lengths cannot be declared"
            )
        if not _is_same(one, cut):
            raise ModelLoadError(
                f"padding changes output {spec.name}: an item of length {short} is answered otherwise where zeros fill "
                f"it up to {long}; lengths.length or lengths.mask must name the input that tells the model what is none"
            )


def _is_same(one: Array, other: Array) -> bool:
    if one.dtype.kind == "f":
        return np.allclose(one, other, PADDING_TOLERANCE, PADDING_TOLERANCE, equal_nan=True)
    return np.array_equal(one, other)


def _varies_with(dims: Sequence[int], shape: Sequence[int], length: int) -> bool:
    return all(size == length for dim, size in zip(dims, shape[1:], strict=True) if dim == -1)
