"""A model's metadata and configuration, as the protocol's JSON. gRPC's messages are made from the same."""

from __future__ import annotations

from typing import Any

from scheduler.tensors import TensorSpec
from server.repository import Model


def model_metadata(model: Model, versions: list[str]) -> dict[str, Any]:
    """GET /v2/models/{model}. Shapes carry the batch axis as -1."""
    return {
        "name": model.name,
        "versions": versions,
        "platform": model.backend,
        "inputs": [*map(_metadata(model), model.signature.inputs), *_bytes_inputs(model)],
        "outputs": [*map(_metadata(model), model.signature.outputs)],
    }


def model_config(model: Model) -> dict[str, Any]:
    """GET /v2/models/{model}/config: Triton's ModelConfig, what is true of this model. Dims without the batch axis.

    A pipeline's BYTES input is optional: it stands for the ready tensor.
    """
    signature = model.signature
    optional = [
        {"name": entry["name"], "data_type": "TYPE_STRING", "dims": [1], "optional": True}
        for entry in _bytes_inputs(model)
    ]
    config: dict[str, Any] = {
        "name": model.name,
        "platform": model.backend,
        "backend": model.backend,
        "version_policy": model.version_policy,
        "max_batch_size": signature.max_batch,
        "input": [*map(_config, signature.inputs), *optional],
        "output": [*map(_config, signature.outputs)],
        "instance_group": [],
        "default_model_filename": model.source.path.rsplit("/", 1)[-1] if model.source is not None else "",
        "parameters": _parameters(model),
    }
    if signature.max_batch > 0:
        config["dynamic_batching"] = {"preferred_batch_size": [], "max_queue_delay_microseconds": 0}
    return config


def _parameters(model: Model) -> dict[str, Any]:
    """What of it is not what it seems: an emulated model, and what is decided by latencies that nobody measured."""
    origin = model.source.latency_origin if model.source is not None else ""
    said = {"emulated": "true" if model.emulated else "", "latency_table": origin}
    return {key: {"string_value": value} for key, value in said.items() if value}


def _metadata(model: Model) -> Any:
    batch = [] if model.signature.max_batch == 0 else [-1]
    return lambda spec: {"name": spec.name, "datatype": spec.datatype, "shape": [*batch, *spec.dims]}


def _bytes_inputs(model: Model) -> list[dict[str, Any]]:
    pipeline = model.serving.preprocess
    return [] if pipeline is None else [{"name": pipeline.input, "datatype": "BYTES", "shape": [-1, 1]}]


def _config(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": f"TYPE_{spec.datatype}", "dims": list(spec.dims)}
