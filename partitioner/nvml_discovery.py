"""What there is: GPUs, what each can be cut into, its instances and slices. Functions over a session."""

from __future__ import annotations

from typing import Any

import pynvml

from partitioner.catalog import model_of_board
from partitioner.geometry import GpuModel, MigProfile, Placement, Slice, conventional_name
from partitioner.nvml_errors import NoPermissionError, NotSupportedError
from partitioner.nvml_session import NvmlSession
from partitioner.nvml_types import Gpu, Instance

MIB = 1024 * 1024
# A whole GPU counts as its largest MIG profile, so that it sorts after every slice.
WHOLE_GPU_GPCS = 7
# Memory slices across most data-centre boards.
USUAL_GRID = 8
_ARCHITECTURES = {
    pynvml.NVML_DEVICE_ARCH_AMPERE: "ampere",
    pynvml.NVML_DEVICE_ARCH_HOPPER: "hopper",
    pynvml.NVML_DEVICE_ARCH_BLACKWELL: "blackwell",
}


def pci_device_id(session: NvmlSession, gpu: Any) -> str:
    """`0x20B210DE`: device and vendor; empty where NVML does not say."""
    info = session.supported("nvmlDeviceGetPciInfo", gpu)
    return "" if info is None else f"0x{int(info.pciDeviceId):08X}"


def pci_subsystem_id(session: NvmlSession, gpu: Any) -> str:
    """`0x147F10DE`: the board and who made it; empty where NVML does not say."""
    info = session.supported("nvmlDeviceGetPciInfo", gpu)
    return f"0x{int(info.pciSubSystemId):08X}" if info is not None and info.pciSubSystemId else ""


def is_ampere(session: NvmlSession, gpu: Any) -> bool:
    """Whether a change of the MIG mode takes a reset of the GPU."""
    return bool(session.call("nvmlDeviceGetArchitecture", gpu) == pynvml.NVML_DEVICE_ARCH_AMPERE)


def model(session: NvmlSession, gpu: Any) -> GpuModel | None:
    """What a GPU can be cut into by NVML's own word, else by the catalogue's; None where there is no MIG.

    Drivers up to R535 say nothing while MIG is off, and places are told to the privileged only.
    """
    if session.mig_mode(gpu) is None:
        return None
    known = model_of_board(pci_device_id(session, gpu), str(session.call("nvmlDeviceGetName", gpu)))
    try:
        profiles = _profiles(session, gpu, known)
    except (NoPermissionError, NotSupportedError):
        return known
    return _gpu_model(session, gpu, profiles, known) if profiles else known


def _gpu_model(session: NvmlSession, gpu: Any, profiles: tuple[MigProfile, ...], known: GpuModel | None) -> GpuModel:
    """Of NVML's own figures; what it has no word for is taken from the catalogue or follows from the MIG profiles."""
    pci_id = pci_device_id(session, gpu)
    architecture = session.supported("nvmlDeviceGetArchitecture", gpu)
    return GpuModel(
        name=known.name if known else str(session.call("nvmlDeviceGetName", gpu)),
        memory_mib=_memory_mib(session, gpu, known),
        memory_slices=max(place.start + place.size for profile in profiles for place in profile.placements),
        compute_slices=max(profile.gpcs for profile in profiles),
        # NVML says 0 while MIG is off.
        max_mig_devices=int(session.call("nvmlDeviceGetMaxMigDeviceCount", gpu))
        or max(profile.max_instances for profile in profiles),
        profiles=profiles,
        architecture=_ARCHITECTURES.get(architecture, ""),
        pci_device_ids=known.pci_device_ids if known and pci_id in known.pci_device_ids else (pci_id,),
    )


def _profiles(session: NvmlSession, gpu: Any, known: GpuModel | None) -> tuple[MigProfile, ...]:
    memory_mib = _memory_mib(session, gpu, known)
    found = [_profile(session, gpu, enum, info, memory_mib) for enum, info in session.mig_profiles(gpu)]
    order = {profile.enum: index for index, profile in enumerate(known.profiles)} if known else {}
    return tuple(sorted(found, key=lambda profile: (order.get(profile.enum, len(order)), profile.enum)))


def _profile(session: NvmlSession, gpu: Any, enum: int, info: Any, gpu_memory_mib: int) -> MigProfile:
    """The two numbers of a MIG profile: `enum` asked for it, `info.id` goes into every other call."""
    placements = session.placements(gpu, int(info.id))
    memory_mib, gpcs = int(info.memorySizeMB), int(info.sliceCount)
    name = getattr(info, "name", "") or conventional_name(enum, gpcs, memory_mib, gpu_memory_mib)
    return MigProfile(
        name=str(name).removeprefix("MIG "),
        enum=enum,
        profile_id=int(info.id),
        gpcs=gpcs,
        memory_mib=memory_mib,
        sm_count=int(info.multiprocessorCount),
        # Some drivers count more instances than there are places (A30).
        max_instances=min(int(info.instanceCount), len(placements)),
        placements=placements,
        copy_engines=int(info.copyEngineCount),
        nvdec=int(info.decoderCount),
        nvenc=int(info.encoderCount),
        jpeg=int(info.jpegCount),
        ofa=int(info.ofaCount),
    )


def instances(session: NvmlSession, gpu: Any, of: GpuModel) -> list[Instance]:
    """Every GPU instance, by start; also those without a compute instance, which no list of MIG devices shows."""
    found = [
        instance(session, handle, of)
        for profile in of.profiles
        for handle in session.instances(gpu, profile.profile_id, max(profile.max_instances, len(profile.placements)))
    ]
    return sorted(found, key=lambda each: each.placement.start)


def instance(session: NvmlSession, handle: Any, of: GpuModel) -> Instance:
    """What NVML says of one GPU instance."""
    info = session.call("nvmlGpuInstanceGetInfo", handle)
    profile = next(each for each in of.profiles if each.profile_id == info.profileId)
    parts = [
        session.call("nvmlComputeInstanceGetInfo_v2", part)
        for part in session.parts(handle, of.name, profile.profile_id)
    ]
    parts.sort(key=lambda part: int(part.id))
    return Instance(
        gi_id=int(info.id),
        profile=profile,
        placement=Placement(int(info.placement.start), int(info.placement.size)),
        ci_ids=tuple(int(part.id) for part in parts),
        # A compute instance's `device` is its MIG device: no need to walk through all of them.
        device_uuid=str(session.call("nvmlDeviceGetUUID", parts[0].device)) if parts else None,
    )


def gpu(session: NvmlSession, index: int, handle: Any, uuid: str, of: GpuModel | None, simulated: bool) -> Gpu:
    """A GPU with its slices as they are now."""
    name = str(session.call("nvmlDeviceGetName", handle))
    mode = session.mig_mode(handle) or (False, False)
    memory_mib = _memory_mib(session, handle, of)
    if mode[0]:
        slices = _mig_slices(session, handle, (index, uuid, name), of, simulated)
    else:
        slices = [_whole_gpu((index, uuid, name), memory_mib, simulated)]
    return Gpu(
        index=index,
        uuid=uuid,
        name=name,
        memory_mib=memory_mib,
        mig_enabled=mode[0],
        simulated=simulated,
        slices=tuple(slices),
        model=of,
        pending_mode=mode[1],
        pci_device_id=pci_device_id(session, handle),
        pci_subsystem_id=pci_subsystem_id(session, handle),
    )


def _whole_gpu(gpu_id: tuple[int, str, str], memory_mib: int, simulated: bool) -> Slice:
    index, uuid, name = gpu_id
    return Slice(
        gpu_index=index,
        gpu_uuid=uuid,
        gpu_name=name,
        device_uuid=uuid,
        mig_profile="",
        gpcs=WHOLE_GPU_GPCS,
        memory_mib=memory_mib,
        gi_id=None,
        ci_id=None,
        start=0,
        size=1,
        grid=1,
        simulated=simulated,
    )


def _mig_slices(
    session: NvmlSession, gpu: Any, gpu_id: tuple[int, str, str], of: GpuModel | None, simulated: bool
) -> list[Slice]:
    index, uuid, name = gpu_id
    slices: list[Slice] = []
    for handle in session.mig_devices(gpu):
        attributes = session.call("nvmlDeviceGetAttributes_v2", handle)
        # NVML's own name of a MIG device ends in its MIG profile: "... MIG 1g.10gb", "... MIG 1c.3g.40gb".
        mig_profile = str(session.call("nvmlDeviceGetName", handle)).rsplit("MIG ", 1)[-1]
        gi_id = int(session.call("nvmlDeviceGetGpuInstanceId", handle))
        place = _place(session, gpu, gi_id)
        if place is None:
            at = max((each.start + each.size for each in slices), default=0)
            place = Placement(at, _size(mig_profile, int(attributes.gpuInstanceSliceCount), of))
        slices.append(
            Slice(
                gpu_index=index,
                gpu_uuid=uuid,
                gpu_name=name,
                device_uuid=str(session.call("nvmlDeviceGetUUID", handle)),
                mig_profile=mig_profile,
                gpcs=int(attributes.computeInstanceSliceCount),
                memory_mib=int(attributes.memorySizeMB),
                gi_id=gi_id,
                ci_id=int(session.call("nvmlDeviceGetComputeInstanceId", handle)),
                start=place.start,
                size=place.size,
                grid=of.memory_slices if of else USUAL_GRID,
                simulated=simulated,
            )
        )
    return sorted(slices, key=lambda each: (each.start, each.ci_id or 0))


def _place(session: NvmlSession, gpu: Any, gi_id: int) -> Placement | None:
    """On the grid; None without the right to ask: then slices are drawn side by side, in NVML's order."""
    handle = session.supported("nvmlDeviceGetGpuInstanceById", gpu, gi_id)
    if handle is None:
        return None
    placement = session.call("nvmlGpuInstanceGetInfo", handle).placement
    return Placement(int(placement.start), int(placement.size))


def _size(mig_profile: str, gpcs: int, of: GpuModel | None) -> int:
    """Memory slices of a MIG profile by its name; by its compute slices where nothing else is known."""
    sizes = {profile.name: profile.size for profile in of.profiles} if of else {}
    return sizes.get(mig_profile, gpcs)


def _memory_mib(session: NvmlSession, gpu: Any, known: GpuModel | None) -> int:
    """Of the whole GPU. In MIG mode it is told to the privileged only."""
    info = session.supported("nvmlDeviceGetMemoryInfo", gpu)
    if info is not None:
        return int(info.total) // MIB
    return known.memory_mib if known else 0
