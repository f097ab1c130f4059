"""Other servers, started beside this one for benchmarks.pictures: what they need, and what a request to them is.

They are installed apart, in .peers, by `make peers`; one that is not there is left out, and said so.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.harness import REPOSITORY, until

START_SECONDS = 60.0
OWN_PYTHON = REPOSITORY / ".peers" / "bin" / "python"


class Post(NamedTuple):
    """One request with a picture."""

    body: bytes
    headers: Mapping[str, str]


def raw(picture: bytes) -> Post:
    return Post(picture, {})


def as_json(picture: bytes) -> Post:
    body = json.dumps({"image": base64.b64encode(picture).decode()}).encode()
    return Post(body, {"Content-Type": "application/json"})


def as_base64_input(picture: bytes) -> Post:
    """Of the Open Inference Protocol, as MLServer has it."""
    entry = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [1, 1],
        "parameters": {"content_type": "base64"},
        "data": [base64.b64encode(picture).decode()],
    }
    return Post(json.dumps({"inputs": [entry]}).encode(), {"Content-Type": "application/json"})


def as_binary_input(picture: bytes) -> Post:
    """Of the Open Inference Protocol, with Triton's binary tensors."""
    data = len(picture).to_bytes(4, "little") + picture
    entry = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [entry]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    return Post(head + data, headers)


class Kind(NamedTuple):
    """`package`: what must be there to import."""

    package: str
    path: str
    post: Callable[[bytes], Post]


PEERS = {
    "fastapi": Kind("fastapi", "", raw),
    "mosec": Kind("mosec", "inference", raw),
    "litserve": Kind("litserve", "predict", as_json),
    "mlserver": Kind("mlserver", "v2/models/small/infer", as_base64_input),
    "pytriton": Kind("pytriton", "v2/models/small/infer", as_binary_input),
}


class Peer(NamedTuple):
    """One that answers."""

    url: str
    pid: int


def python() -> str:
    """The interpreter that peers are run by."""
    return str(OWN_PYTHON) if OWN_PYTHON.exists() else sys.executable


def is_there(name: str) -> bool:
    """Can it be run?"""
    found = f"import sys, importlib.util; sys.exit(importlib.util.find_spec({PEERS[name].package!r}) is None)"
    return subprocess.run([python(), "-c", found], check=False).returncode == 0


@contextmanager
def started(name: str, model: Path, picture: bytes) -> Iterator[Peer]:
    """Once it answers a picture. Raises AssertionError if it does not."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python(), "-m", f"benchmarks.peer_{name}", str(port), str(model)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=REPOSITORY
    ) as process:
        try:
            url = f"http://127.0.0.1:{port}/{PEERS[name].path}"
            until(lambda: _answers(url, PEERS[name].post(picture)), f"{name} answers", START_SECONDS)
            yield Peer(url, process.pid)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _answers(url: str, post: Post) -> bool:
    request = urllib.request.Request(url, post.body, dict(post.headers), method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
