"""NVIDIA's own load generator, unchanged, against the real daemon."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from tests.harness import REPOSITORY, RunningDaemon

TOOLS = REPOSITORY / ".tools"


def runs() -> bool:
    """`make test` fetches the binary; one of its libraries comes from `make system-tools`."""
    if not (TOOLS / "perf_analyzer").exists() or shutil.which("ldconfig") is None:
        return False
    return "libb64.so.0d" in subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not runs(), reason="perf_analyzer or its libb64 is missing; make system-tools")
@pytest.mark.parametrize("model", ["digits", "mlp"])
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_perf_analyzer_completes_at_concurrency_1_to_16_without_an_error(
    protocol: str, model: str, daemon: RunningDaemon
) -> None:
    command = [str(TOOLS / "perf_analyzer"), "-m", model, "-i", protocol, "-u", getattr(daemon, protocol)]
    # 1, 6, 11, 16 at once. Stability is not asked for (-s): the point is that it completes.
    command += ["--concurrency-range", "1:16:5", "--measurement-interval", "150", "-s", "10000", "-r", "3"]
    environment = os.environ | {"LD_LIBRARY_PATH": str(TOOLS)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"Concurrency: (\d+), throughput: ([\d.]+) infer/sec, latency (\d+) usec", done.stdout)
    assert [int(concurrency) for concurrency, _, _ in found] == [1, 6, 11, 16], done.stdout
    print(f"{protocol} {model}: " + ", ".join(f"{c} at once {float(rate):.0f}/s" for c, rate, _ in found))
    failures = re.findall(r"(?:error|fail)[^\n]*", done.stdout + done.stderr, re.IGNORECASE)
    assert failures == []
