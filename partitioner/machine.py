"""Who else manages MIG on this machine, and the lock among our own processes."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from partitioner.nvml_errors import MachineBusyError

# The first pid namespace has this fixed inode number in Linux (PROC_PID_INIT_INO).
_HOSTS_PID_NAMESPACE = "pid:[4026531836]"


@dataclass(frozen=True, slots=True)
class _Manager:
    """How to know somebody else who changes MIG by himself. Names of processes are cut to 15 letters by Linux."""

    name: str
    processes: tuple[str, ...]
    files: tuple[str, ...]
    how_to_stop: str


_MANAGERS = (
    _Manager(
        "NVIDIA's mig-manager",
        ("nvidia-mig-mana",),
        ("etc/systemd/system/*.wants/nvidia-mig-manager.service",),
        "systemctl disable --now nvidia-mig-manager, or in Kubernetes migManager.enabled=false",
    ),
    _Manager(
        "the NVIDIA DRA driver",
        ("gpu-kubelet-plu",),
        ("var/lib/kubelet/plugins/gpu.nvidia.com/*.sock", "var/lib/kubelet/plugins_registry/gpu.nvidia.com*.sock"),
        "keep this node out of the DRA driver",
    ),
    _Manager(
        "HAMi",
        ("vGPUmonitor",),
        ("usr/local/vgpu/libvgpu.so",),
        "take the label gpu=on from this node",
    ),
)


def foreign_manager(root: Path = Path("/")) -> str | None:
    """Who else owns MIG here, by what trace, and how to stop it; None if nobody is seen.

    In a container only its own processes and files are seen: what runs on the host beside it is not noticed.
    """
    running = _process_names(root)
    for manager in _MANAGERS:
        traces = [f"process {name}" for name in manager.processes if name in running]
        traces += [f"/{path.relative_to(root)}" for pattern in manager.files for path in sorted(root.glob(pattern))]
        if traces:
            return f"{manager.name} manages MIG on this machine ({traces[0]}); {manager.how_to_stop}"
    return None


def in_pid_namespace(root: Path | None) -> bool:
    """Whether this process counts pids otherwise than the host, as in a container without `--pid=host`."""
    try:
        return os.readlink((root or Path("/")) / "proc/self/ns/pid") != _HOSTS_PID_NAMESPACE
    except OSError:
        return False


def _process_names(root: Path) -> set[str]:
    names = set()
    for path in root.glob("proc/[0-9]*/comm"):
        try:
            names.add(path.read_text().strip())
        except OSError:
            continue  # it has ended meanwhile
    return names


def default_lock_path(folders: Sequence[Path] = (Path("/run/lock"), Path(tempfile.gettempdir()))) -> Path:
    """In the first of `folders` that can be written."""
    for folder in folders:
        if folder.is_dir() and os.access(folder, os.W_OK):
            return folder / "migserve-gpus.lock"
    return folders[-1] / "migserve-gpus.lock"


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Only one process changes GPUs at a time. Ends with the process, however it ends.

    Raises MachineBusyError, naming the process that holds it.
    """
    with _open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = file.read().strip() or "another process"
            raise MachineBusyError(
                f"{holder} is changing the GPUs of this machine (lock {path}); wait until it has finished"
            ) from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} ({command(os.getpid())})")
        file.flush()
        yield
        file.truncate(0)


def _open(path: Path) -> TextIO:
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
    except OSError as error:
        raise MachineBusyError(f"the lock {path} cannot be opened: {error.strerror}; run as its owner") from error


def command(pid: int) -> str:
    """The command line of a process, shortened; `gone` when it has ended."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "gone"
    return line[:80] or "unknown"
