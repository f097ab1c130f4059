"""torch models: `.pt2` (torch.export) and TorchScript `.pt`, on the CPU. `cuda.py` builds on it.

Safety: `torch.export.load` falls back to full unpickling when weights-only loading fails (read in torch
2.13), so workers set TORCH_FORCE_WEIGHTS_ONLY_LOAD=1. That is hardening, not proof: load only models you trust.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from scheduler.backends import DEFAULT_MAX_BATCH, Array, ModelLoadError, join_in_memory
from scheduler.channel import ModelSource
from scheduler.tensors import Signature, TensorSpec

# It logs a traceback of a file that it cannot read before it raises; we say in one sentence what is wrong.
logging.getLogger("torch.export").setLevel(logging.ERROR)

Program = Callable[..., Sequence[torch.Tensor]]

DATATYPE_OF_TORCH = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.uint16: "UINT16",
    torch.uint32: "UINT32",
    torch.uint64: "UINT64",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
    torch.float32: "FP32",
    torch.float64: "FP64",
}


class TorchBackend:
    """A torch model on the CPU."""

    def __init__(self, source: ModelSource, device: str = "cpu") -> None:
        self._program, self.signature = load_program(source, device)
        self._as_tensor = [
            _bf16_from_bits if spec.datatype == "BF16" else torch.from_numpy for spec in self.signature.inputs
        ]

    def join(self, parts: list[memoryview], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return join_in_memory(parts, shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return np.zeros(shape, dtype)

    def start(self, inputs: list[Array]) -> Sequence[torch.Tensor]:
        return self._program(*self.as_tensors(inputs))

    def finish(self, started: Sequence[torch.Tensor]) -> list[Array]:
        return [as_array(tensor) for tensor in started]

    def as_tensors(self, inputs: list[Array]) -> list[torch.Tensor]:
        """The arrays as tensors over the same memory."""
        return [as_tensor(array) for as_tensor, array in zip(self._as_tensor, inputs, strict=True)]


def _bf16_from_bits(array: Array) -> torch.Tensor:
    return torch.from_numpy(array).view(torch.bfloat16)


def as_array(tensor: torch.Tensor) -> Array:
    """A contiguous CPU tensor as an array over the same memory; BF16 as its bits."""
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


def load_program(source: ModelSource, device: str) -> tuple[Program, Signature]:
    """The model as a function of its input tensors, and its signature. Raises ModelLoadError."""
    path = Path(source.path)
    try:
        if path.suffix == ".pt2":
            return _load_exported(path, source, device)
        return _load_torchscript(path, source, device)
    except ModelLoadError:
        raise
    except Exception as error:  # torch raises anything from ValueError to zipfile's own
        raise ModelLoadError(f"{path.name} cannot be loaded: {type(error).__name__}: {error}") from error


# ---- torch.export ----


def _load_exported(path: Path, source: ModelSource, device: str) -> tuple[Program, Signature]:
    program = torch.export.load(path)
    if device != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    signature = _exported_signature(program, source)
    return _bare_graph(program) or _checked_module(program), signature


def _bare_graph(program: ExportedProgram) -> Program | None:
    """The exported graph as a plain function, without the module's pytrees and guards.

    Those cost 40 to 80 us a call (torch 2.13, CPU); shapes and types are checked before a request is queued.
    None for a program that changes its buffers: that needs the module around it.
    """
    graph = program.graph_signature
    if any(spec.kind != OutputKind.USER_OUTPUT for spec in graph.output_specs):
        return None
    fixed: list[Any] = []
    slots: list[int] = []
    for index, spec in enumerate(graph.input_specs):
        if spec.kind == InputKind.USER_INPUT:
            slots.append(index)
            fixed.append(None)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and spec.target:
            owner = program.state_dict if spec.target in program.state_dict else program.constants
            fixed.append(owner[spec.target])
        else:
            return None
    function = program.graph_module.forward
    first = slots[0]
    if slots == list(range(first, len(fixed))):
        weights = fixed[:first]
        return lambda *inputs: function(*weights, *inputs)
    return None


def _checked_module(program: ExportedProgram) -> Program:
    module = program.module()
    return lambda *inputs: pytree.tree_leaves(module(*inputs))


def _exported_signature(program: ExportedProgram, source: ModelSource) -> Signature:
    placeholders = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    inputs = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            if not isinstance(spec.arg, TensorArgument):
                raise ModelLoadError(f"input {_argument_name(spec.arg)} is not a tensor; only tensors are served")
            inputs[spec.arg.name] = placeholders[spec.arg.name]
    if not inputs:
        raise ModelLoadError("the model has no tensor input")
    output_node = next(node for node in program.graph.nodes if node.op == "output")
    user_outputs = [
        value.meta["val"]
        for value, spec in zip(output_node.args[0], program.graph_signature.output_specs, strict=True)
        if spec.kind == OutputKind.USER_OUTPUT
    ]
    batch = _batch_symbol([*inputs.values(), *user_outputs])
    specs_in = tuple(_spec(name, value, batch) for name, value in inputs.items())
    names = _output_names(program, len(user_outputs))
    specs_out = tuple(_spec(name, value, batch) for name, value in zip(names, user_outputs, strict=True))
    return Signature(
        _renamed(specs_in, source.inputs, "input"),
        _renamed(specs_out, source.outputs, "output"),
        _max_batch(program, batch, source.max_batch),
        max(_bounds(program, batch)[0], 1) if batch else 1,
        _sample_dims(program, list(inputs.values()), batch),
    )


def _argument_name(argument: Any) -> str:
    return argument.name if isinstance(argument, ConstantArgument) else str(argument)


def _batch_symbol(values: Sequence[torch.Tensor]) -> str | None:
    """The symbol that leads every input and output, as text; None where there is no such one."""
    leading = {str(value.shape[0]) if value.dim() else "" for value in values}
    symbol = leading.pop()
    return None if leading or symbol.isdigit() or not symbol else symbol


def _spec(name: str, value: torch.Tensor, batch: str | None) -> TensorSpec:
    if value.dtype not in DATATYPE_OF_TORCH:
        raise ModelLoadError(f"{name} has type {value.dtype}, which the Open Inference Protocol has no word for")
    shape = value.shape[1:] if batch else value.shape
    dims = tuple(int(str(dim)) if str(dim).isdigit() else -1 for dim in shape)
    return TensorSpec(name, DATATYPE_OF_TORCH[value.dtype], dims)


def _output_names(program: ExportedProgram, count: int) -> list[str]:
    """The keys of a model that returns a dict, else output_0, output_1, ..."""
    spec = program.call_spec.out_spec
    if spec is not None and spec.type is dict and len(spec.context) == count:
        return [str(key) for key in spec.context]
    return [f"output_{index}" for index in range(count)]


def _renamed(
    found: tuple[TensorSpec, ...], declared: tuple[TensorSpec, ...] | None, kind: str
) -> tuple[TensorSpec, ...]:
    """What the model says, under the names of config.pbtxt. Raises ModelLoadError where the two disagree."""
    if not declared:
        return found
    if len(declared) != len(found):
        raise ModelLoadError(f"config.pbtxt declares {len(declared)} {kind}s, the model has {len(found)}")
    by_name = {spec.name: spec for spec in declared}
    if all(spec.name in by_name for spec in found):
        declared = tuple(by_name[spec.name] for spec in found)
    for ours, theirs in zip(found, declared, strict=True):
        if ours.datatype != theirs.datatype or not _agree(ours.dims, theirs.dims):
            raise ModelLoadError(
                f"config.pbtxt declares {kind} {theirs.name} as {theirs.datatype} {list(theirs.dims)}, "
                f"the model has {ours.datatype} {list(ours.dims)}"
            )
    return tuple(
        TensorSpec(theirs.name, ours.datatype, ours.dims) for ours, theirs in zip(found, declared, strict=True)
    )


def _agree(ours: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """-1 stands for any size."""
    return len(ours) == len(theirs) and all(a == b or -1 in (a, b) for a, b in zip(ours, theirs, strict=True))


def _bounds(program: ExportedProgram, symbol: str) -> tuple[int, int | None]:
    for key, value_range in program.range_constraints.items():
        if str(key) == symbol:
            upper = str(value_range.upper)
            return int(value_range.lower), int(upper) if upper.isdigit() else None
    return 1, None


def _max_batch(program: ExportedProgram, batch: str | None, declared: int | None) -> int:
    if batch is None:
        if declared:
            raise ModelLoadError(
                f"config.pbtxt sets max_batch_size {declared}, but the model was exported without a batch axis "
                f"that is dynamic and comes first in every input and output; export it with "
                f'dynamic_shapes={{0: torch.export.Dim("batch", min=1, max=...)}}'
            )
        return 0
    _, upper = _bounds(program, batch)
    if declared is None:
        return upper or DEFAULT_MAX_BATCH
    if upper is not None and declared > upper:
        raise ModelLoadError(f"config.pbtxt sets max_batch_size {declared}, the model was exported for {upper}")
    return declared


def _sample_dims(program: ExportedProgram, inputs: list[torch.Tensor], batch: str | None) -> tuple[int, ...]:
    """Small legal values of the varying axes, for a first run."""
    dims = [str(dim) for value in inputs for dim in (value.shape[1:] if batch else value.shape)]
    return tuple(max(2, _bounds(program, dim)[0]) for dim in dims if not dim.isdigit())


# ---- TorchScript ----


def _load_torchscript(path: Path, source: ModelSource, device: str) -> tuple[Program, Signature]:
    if not source.inputs or not source.outputs:
        raise ModelLoadError("a TorchScript model says nothing of its shapes: declare them in config.pbtxt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, on every load
        module = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]  # torch's
    varying = sum(dim == -1 for spec in source.inputs for dim in spec.dims)
    max_batch = source.max_batch or 0
    signature = Signature(source.inputs, source.outputs, max_batch, sample_dims=(2,) * varying)
    names = [spec.name for spec in source.outputs]

    def call(*inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        result = module(*inputs)
        if isinstance(result, dict):
            return [result[name] for name in names]
        return [result] if isinstance(result, torch.Tensor) else list(result)

    return call, signature
