"""What can be measured on the slices that there are, by the simulated driver."""

from __future__ import annotations

import pytest

from partitioner.nvml import NvmlDoor
from partitioner.simulated_nvml import SimulatedNvml, parse_gpus
from server import profile_places
from server.gpus import StartError


def door(spec: str, layout: str | None) -> tuple[SimulatedNvml, NvmlDoor]:
    sim = SimulatedNvml(parse_gpus(spec, layout))
    return sim, NvmlDoor(sim, simulated=True)


@pytest.mark.parametrize(
    ("layout", "counted"), [("off", True), ("7g.80gb", True), ("1g.10gb", True), ("3g.40gb+3g.40gb", False)]
)
def test_energy_is_told_only_where_no_other_slice_may_take_some_of_it(layout: str, counted: bool) -> None:
    sim, opened = door("H100-80GB", layout)
    uuid = opened.gpus()[0].uuid
    sim.draw(uuid, 100.0)
    machine = profile_places.cuda(opened)
    for place in machine.places.values():
        assert (place.gauges.energy_j is not None) == counted
        if place.gauges.energy_j is not None:
            assert place.gauges.energy_j() is not None
            sim.lose(uuid)
            assert place.gauges.energy_j() is None
    machine.close()


def test_activity_is_that_of_the_slice_s_own_instance() -> None:
    sim, opened = door("H100-80GB", "3g.40gb+2g.20gb+1g.10gb")
    for each in opened.gpus()[0].slices:
        sim.set_activity(each.gpu_uuid, each.gi_id or 0, 10.0 * each.gpcs)
    machine = profile_places.cuda(opened)
    found = {}
    for name, place in machine.places.items():
        assert place.gauges.sm_activity is not None
        found[name] = place.gauges.sm_activity()
    assert found == {"3g.40gb": 0.3, "2g.20gb": 0.2, "1g.10gb": 0.1}
    machine.close()


def test_without_a_slice_the_driver_is_let_go() -> None:
    sim, opened = door("H100-80GB", "empty")
    with pytest.raises(StartError, match="no slice"):
        profile_places.cuda(opened)
    assert sim.calls[-1] == "nvmlShutdown"


def test_shares_of_a_whole_gpu_stand_for_the_slices_that_it_could_be_cut_into() -> None:
    cut, whole = parse_gpus("A100-80GB", "3g.40gb"), parse_gpus("A100-80GB,H100-80GB", "off")[1:]
    sim = SimulatedNvml([*cut, *whole])
    opened = NvmlDoor(sim, simulated=True)
    machine = profile_places.shares(opened)
    assert (machine.gpu, machine.source) == ("H100-80GB", "sm-shares")
    assert {name: (place.device.sm_count, place.device.memory_mib) for name, place in machine.places.items()} == {
        "1g.10gb": (16, 9984),
        "2g.20gb": (32, 20096),
        "3g.40gb": (60, 40448),
        "4g.40gb": (64, 40448),
        "7g.80gb": (132, 81152),
    }
    assert {place.device.uuid for place in machine.places.values()} == {whole[0].uuid}
    assert sim.calls[-1] == "nvmlShutdown"


def test_there_are_no_shares_of_what_is_cut() -> None:
    sim, opened = door("H100-80GB", "3g.40gb")
    with pytest.raises(StartError, match="every GPU is cut"):
        profile_places.shares(opened)
    assert sim.calls[-1] == "nvmlShutdown"


def test_shares_are_taken_of_a_gpu_that_nobody_uses() -> None:
    gpus = parse_gpus("H100-80GBx2", "off")
    held = {gpus[0].uuid: [4711]}
    sim = SimulatedNvml(gpus, clients=lambda uuid: held.get(uuid, []))
    machine = profile_places.shares(NvmlDoor(sim, simulated=True))
    assert {place.device.uuid for place in machine.places.values()} == {gpus[1].uuid}
    held[gpus[1].uuid] = [4712]
    with pytest.raises(StartError, match="GPU 0 is used by pid 4711"):
        profile_places.shares(NvmlDoor(sim, simulated=True))


def test_slices_of_which_the_sms_are_not_known_are_no_shares() -> None:
    _, opened = door("B200-180GB", "off")
    with pytest.raises(StartError, match=r"how many SMs 3g.90gb, 4g.90gb, 7g.180gb of a .* is not known"):
        profile_places.shares(opened)
