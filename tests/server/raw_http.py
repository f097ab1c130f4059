"""HTTP by hand, for what stock clients would never send."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any, NamedTuple


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"])


def request(
    url: str, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> Answer:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection(url, timeout=30)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    answer = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    connection.close()
    return answer


def infer(url: str, model: str, body: Any, headers: dict[str, str] | None = None) -> Answer:
    """POST to the infer route; a body that is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request(url, "POST", f"/v2/models/{model}/infer", data, headers)


def connect(url: str) -> socket.socket:
    host, port = url.split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def read_answers(sock: socket.socket, count: int) -> list[Answer]:
    """So many responses off one connection."""
    file = sock.makefile("rb")
    answers = []
    for _ in range(count):
        status = int(file.readline().split()[1])
        headers = {}
        while line := file.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        answers.append(Answer(status, headers, file.read(int(headers["content-length"]))))
    file.close()
    return answers
