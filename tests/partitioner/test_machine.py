"""Traces of others who manage MIG, and the lock among processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from partitioner.machine import default_lock_path, exclusive, foreign_manager
from partitioner.nvml_errors import MachineBusyError


@pytest.mark.parametrize(
    ("trace", "content", "name"),
    [
        ("proc/71/comm", "nvidia-mig-mana\n", "mig-manager manages MIG on this machine \\(process nvidia-mig-mana"),
        ("etc/systemd/system/multi-user.target.wants/nvidia-mig-manager.service", "", "systemctl disable"),
        ("proc/71/comm", "gpu-kubelet-plu\n", "the NVIDIA DRA driver manages MIG"),
        ("var/lib/kubelet/plugins/gpu.nvidia.com/dra.sock", "", "DRA driver .*/var/lib/kubelet"),
        ("var/lib/kubelet/plugins_registry/gpu.nvidia.com-reg.sock", "", "the NVIDIA DRA driver manages MIG"),
        ("proc/71/comm", "vGPUmonitor\n", "HAMi manages MIG"),
        ("usr/local/vgpu/libvgpu.so", "", "HAMi manages MIG"),
    ],
)
def test_others_who_manage_mig_are_named_with_their_trace(tmp_path: Path, trace: str, content: str, name: str) -> None:
    (tmp_path / trace).parent.mkdir(parents=True)
    (tmp_path / trace).write_text(content)
    found = foreign_manager(tmp_path)
    assert found is not None
    assert re.search(name, found)


def test_nobody_is_suspected_without_a_trace(tmp_path: Path) -> None:
    for pid, comm in [("1", "systemd"), ("70", "nvidia-persiste"), ("72", "dcgm-exporter")]:
        (tmp_path / "proc" / pid).mkdir(parents=True)
        (tmp_path / "proc" / pid / "comm").write_text(comm)
    (tmp_path / "proc" / "99").mkdir()  # has ended meanwhile
    (tmp_path / "var/lib/kubelet/plugins").mkdir(parents=True)
    assert foreign_manager(tmp_path) is None


def test_the_lock_names_the_process_that_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    program = (
        "import sys; from pathlib import Path; from partitioner.machine import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(MachineBusyError, match=rf"pid {other.pid} \(.*\) is changing the GPUs"), exclusive(path):
            pass
        other.kill()  # however it ends, the lock ends with it
    with exclusive(path):
        assert path.read_text().startswith(f"pid {os.getpid()} (")
        assert path.read_text().count("pid") == 1
    path.write_text("left by one that was killed" * 20)
    with exclusive(path):
        assert "left by" not in path.read_text()
    with exclusive(path):
        pass


def test_the_lock_lies_where_it_can_be_written(tmp_path: Path) -> None:
    here, there = tmp_path / "absent", tmp_path / "there"
    there.mkdir()
    assert default_lock_path((here, there)) == there / "migserve-gpus.lock"
    with pytest.raises(MachineBusyError, match="cannot be opened: No such file"), exclusive(here / "lock"):
        pass
