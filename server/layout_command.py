"""What `migserve layout show|apply|assert|export` does. Each verb returns an exit code."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from partitioner.geometry import IllegalLayoutError, MigProfile, Slice, parse_layout
from partitioner.layout_file import Device, LayoutFileError, Target, export, parse, select, targets
from partitioner.nvml import NvmlDoor
from partitioner.nvml_errors import NvmlError
from partitioner.nvml_types import Gpu
from partitioner.reconfigure import Reconfigurer, RefusedChangeError, Result
from partitioner.tenants import Nobody
from server import picture, plan_drawing
from server.gpus import StartError, open_gpus

OK, DIFFERENT, USAGE = 0, 1, 2
_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True, style="red")


@dataclass(frozen=True, slots=True)
class Machine:
    """Which GPUs a verb is about; as of `serve`."""

    gpu: str
    simulation_state: Path | None
    layout: str | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """A layout file and the name of a config in it; or a layout for all GPUs, `gpu=layout` for one of them."""

    file: Path | None
    config: str | None
    layouts: Sequence[str]


class _UsageError(Exception):
    """The wish cannot be understood. The message says why."""


def show(machine: Machine, *, as_json: bool, out: Path | None = None) -> int:
    """Draws the GPUs in the terminal or into a file, or prints them as JSON."""
    try:
        door = _open(machine)
    except StartError as error:
        return _fail(error, DIFFERENT)
    gpus = door.gpus()
    if out is not None:
        try:
            plan_drawing.write_layout(gpus, lambda where: [_gpcs(where), f"{where.memory_mib / 1024:.1f} GiB"], out)
        except (ValueError, OSError) as error:
            return _fail(f"--out {out}: {error}", USAGE)
    elif as_json:
        print(json.dumps({"gpus": [_as_data(gpu) for gpu in gpus]}, indent=2))
    else:
        console = picture.console()
        console.print(picture.layout(gpus, lambda where: [_gpcs(where), where.device_uuid]))
        if any(gpu.simulated for gpu in gpus) and machine.simulation_state is None:
            told = "A simulation of its own: a running daemon tells of its layout at localhost:8003/admin/layout"
            console.print(told, style="yellow", soft_wrap=True)
    door.close()
    return OK


def apply(machine: Machine, wish: Wish, *, dry_run: bool) -> int:
    """Changes the GPUs: MIG mode, then slices, keeping those that can stay."""
    try:
        door = _open(machine)
        wanted = _wanted(wish, door.gpus())
        if dry_run:
            for line in asyncio.run(_steps(door, wanted)):
                _out.print(line, markup=False)
            return OK
        return asyncio.run(_apply(door, wanted))
    except (_UsageError, LayoutFileError, IllegalLayoutError) as error:
        return _fail(error, USAGE)
    except (StartError, RefusedChangeError, NvmlError, OSError) as error:
        return _fail(error, DIFFERENT)


def check(machine: Machine, wish: Wish) -> int:
    """Says whether every GPU is as wished; exit code 1 if one is not, or if the file says nothing of it."""
    try:
        gpus = _open(machine).gpus()
        wanted = _wanted(wish, gpus)
    except (_UsageError, LayoutFileError, IllegalLayoutError) as error:
        return _fail(error, USAGE)
    except (StartError, NvmlError, OSError) as error:
        return _fail(error, DIFFERENT)
    code = OK
    for gpu in gpus:
        target = wanted.get(gpu.index)
        if target is None:
            _out.print(f"GPU {gpu.index}: the wish says nothing of it", markup=False)
            code = DIFFERENT
        elif _target_of(gpu) != _sorted(target):
            _out.print(f"GPU {gpu.index}: is {_layout_of(gpu)}, should be {_name(target)}", markup=False)
            code = DIFFERENT
    if code == OK:
        _out.print("as wished")
    return code


def write(machine: Machine, name: str) -> int:
    """Prints the GPUs as a layout file; exit code 1 if one is cut as no layout file can say."""
    try:
        gpus = _open(machine).gpus()
    except StartError as error:
        return _fail(error, DIFFERENT)
    found: dict[int, Target] = {}
    for gpu in gpus:
        target = _target_of(gpu)
        if target is None:
            return _fail(f"GPU {gpu.index} has split compute instances, which a layout file cannot say", DIFFERENT)
        if gpu.model is not None:
            found[gpu.index] = target
    sys.stdout.write(export(name, found))
    return OK


# ---- doing it ----


async def _steps(door: NvmlDoor, wanted: dict[int, Target]) -> list[str]:
    reconfigurer = Reconfigurer(door, Nobody())
    lines = []
    for gpu in door.gpus():
        target = wanted.get(gpu.index)
        if target is None:
            lines.append(f"GPU {gpu.index}: stays as it is, the wish says nothing of it")
        elif target.mig_enabled != gpu.mig_enabled:
            lines.append(f"GPU {gpu.index}: switch MIG {'on' if target.mig_enabled else 'off, after destroying all'}")
            lines += [f"GPU {gpu.index}: create {_name(target)}"] if target.profiles else []
        elif gpu.mig_enabled:
            (change,) = await reconfigurer.changes({gpu.uuid: target.profiles})
            lines += change.steps()
    return lines


async def _apply(door: NvmlDoor, wanted: dict[int, Target]) -> int:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):  # a half-cut GPU helps nobody
        loop.add_signal_handler(number, _err.print, "the change goes on to its end, or is undone; please wait")
    reconfigurer = Reconfigurer(door, Nobody(), tell=lambda step: _out.print(step, markup=False))
    for gpu in door.gpus():
        target = wanted.get(gpu.index)
        if target is not None and target.mig_enabled and not (gpu.mig_enabled and gpu.pending_mode):
            await reconfigurer.switch(gpu.uuid, on=True)
    layouts = {gpu.uuid: wanted[gpu.index].profiles for gpu in door.gpus() if gpu.index in wanted and gpu.mig_enabled}
    outcome = await reconfigurer.apply(layouts)
    if outcome.result in (Result.RESTORED, Result.NEAREST):
        _err.print(f"{outcome.result}: {outcome.reason}", markup=False)
        return DIFFERENT
    for gpu in door.gpus():
        target = wanted.get(gpu.index)
        if target is not None and not target.mig_enabled and gpu.mig_enabled:
            await reconfigurer.switch(gpu.uuid, on=False)
    _out.print(str(outcome.result))
    return OK


# ---- what is wished ----


def _wanted(wish: Wish, gpus: Sequence[Gpu]) -> dict[int, Target]:
    if (wish.file is None) == (not wish.layouts):
        raise _UsageError(
            "say what you wish: either --file (and --config), or layouts such as 3g.40gb+3g.40gb or 0=7g.80gb"
        )
    if wish.file is not None:
        _, entries = select(parse(_read(wish.file)), wish.config)
        return targets(entries, [Device(gpu.index, gpu.pci_device_id, gpu.pci_subsystem_id, gpu.model) for gpu in gpus])
    found: dict[int, Target] = {}
    for layout in wish.layouts:
        which, is_one, names = layout.rpartition("=")
        chosen = [gpu for gpu in gpus if not is_one or which in (str(gpu.index), gpu.uuid)]
        if not chosen:
            raise _UsageError(f"there is no GPU {which!r}; there are {', '.join(str(gpu.index) for gpu in gpus)}")
        for gpu in chosen:
            found[gpu.index] = _parsed(names, gpu)
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise _UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _parsed(names: str, gpu: Gpu) -> Target:
    if names == "off":
        return Target(mig_enabled=False, profiles=())
    if gpu.model is None:
        raise _UsageError(f"GPU {gpu.index}, {gpu.name}, has no MIG; name the others: 0=...")
    return Target(mig_enabled=True, profiles=tuple(each.profile for each in parse_layout(names, gpu.model)))


def _target_of(gpu: Gpu) -> Target | None:
    """What a layout file would say of it; None where compute instances are split (`1c.3g.40gb`)."""
    if gpu.model is None or not gpu.mig_enabled:
        return Target(mig_enabled=False, profiles=())
    known = {profile.name: profile for profile in gpu.model.profiles}
    if any(each.mig_profile not in known for each in gpu.slices):
        return None
    return _sorted(Target(mig_enabled=True, profiles=tuple(known[each.mig_profile] for each in gpu.slices)))


def _sorted(target: Target) -> Target:
    return Target(target.mig_enabled, tuple(sorted(target.profiles, key=_by_size)))


def _by_size(profile: MigProfile) -> tuple[int, int]:
    return -profile.gpcs, profile.enum


def _name(target: Target) -> str:
    if not target.mig_enabled:
        return "MIG off"
    return "+".join(profile.name for profile in _sorted(target).profiles) or "MIG on, without slices"


def _layout_of(gpu: Gpu) -> str:
    target = _target_of(gpu)
    return "+".join(each.mig_profile for each in gpu.slices) if target is None else _name(target)


# ---- small things ----


def _open(machine: Machine) -> NvmlDoor:
    return open_gpus(machine.gpu, machine.layout, machine.simulation_state)


def _gpcs(where: Slice) -> str:
    return "1 GPC" if where.gpcs == 1 else f"{where.gpcs} GPCs"


def _as_data(gpu: Gpu) -> dict[str, object]:
    return {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "mig_enabled": gpu.mig_enabled,
        "simulated": gpu.simulated,
        "layout": _layout_of(gpu),
        "slices": [
            {"mig_profile": each.mig_profile, "start": each.start, "size": each.size, "uuid": each.device_uuid}
            for each in gpu.slices
        ],
    }


def _fail(error: object, code: int) -> int:
    _err.print(str(error), markup=False)
    return code
