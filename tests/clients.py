"""Stock clients, and many of them at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

Array = np.ndarray[Any, Any]


def http_json(url: str) -> Callable[[str, Array], Any]:
    return _http(url, binary=False)


def http_binary(url: str) -> Callable[[str, Array], Any]:
    return _http(url, binary=True)


def _http(url: str, binary: bool) -> Callable[[str, Array], Any]:
    client = httpclient.InferenceServerClient(url, connection_timeout=60, network_timeout=60)

    def infer(model: str, x: Array) -> Any:
        tensor = httpclient.InferInput("x", x.shape, "FP32")
        tensor.set_data_from_numpy(x, binary_data=binary)
        outputs = [httpclient.InferRequestedOutput(name, binary_data=binary) for name in OUTPUTS[model]]
        return client.infer(model, [tensor], outputs=outputs)

    return infer


def grpc_unary(url: str) -> Callable[[str, Array], Any]:
    client = grpcclient.InferenceServerClient(url)

    def infer(model: str, x: Array) -> Any:
        return client.infer(model, [_grpc_input(x)], client_timeout=60)

    return infer


def grpc_stream(url: str) -> Callable[[str, Array], Any]:
    client = grpcclient.InferenceServerClient(url)
    replies: queue.Queue[tuple[Any, InferenceServerException | None]] = queue.Queue()
    client.start_stream(lambda result, error: replies.put((result, error)))

    def infer(model: str, x: Array) -> Any:
        client.async_stream_infer(model, [_grpc_input(x)])
        result, error = replies.get(timeout=60)
        if error is not None:
            raise error
        return result

    return infer


def _grpc_input(x: Array) -> Any:
    tensor = grpcclient.InferInput("x", x.shape, "FP32")
    tensor.set_data_from_numpy(x)
    return tensor


OUTPUTS = {"digits": ("label", "scores"), "affine": ("y",), "mlp": ("y",)}
PROTOCOLS = {
    "HTTP JSON": ("http", http_json),
    "HTTP binary": ("http", http_binary),
    "gRPC": ("grpc", grpc_unary),
    "gRPC stream": ("grpc", grpc_stream),
}


def in_threads(count: int, jobs: Iterable[Any], start: Callable[[], Callable[[Any], None]]) -> None:
    """Does the jobs in `count` threads; `start` gives each thread its own client. Raises the first error."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            do = start()
            while not errors:
                do(waiting.get_nowait())
        except queue.Empty:
            pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
