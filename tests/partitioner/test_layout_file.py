"""Layout files in mig-parted's form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner.catalog import GPU_MODELS
from partitioner.geometry import maximal_multisets
from partitioner.layout_file import Device, LayoutFileError, Target, export, parse, select, targets

A100, A30 = GPU_MODELS["A100-80GB"], GPU_MODELS["A30-24GB"]
MACHINE = [
    Device(0, "0x20B210DE", "0x147F10DE", A100),
    Device(1, "0x20B710DE", "", A30),
    Device(2, "0x1EB810DE", "", None),
]
FILE = """
version: v1
mig-configs:
  all-disabled:
  - devices: all
    mig-enabled: false
  all-balanced:
  - device-filter: ["0x20B210DE", "0x20B510DE"]
    devices: all
    mig-enabled: true
    mig-devices: {"1g.10gb": 2, 2g.20gb: 1, "3g.40gb": 1}
  - device-filter: "0x20B710DE"
    devices: all
    mig-enabled: true
    mig-devices:
      "1g.6gb": 2
      "2g.12gb": 1
  some:
  - devices: all
    mig-enabled: true
    mig-devices: {}
  - devices: [0]
    mig-enabled: true
    mig-devices: {"1g.10gb+me": 1, "7g.80gb": 0}
  board:
  - device-filter: "0x20b210de:0x147f10de"
    devices: all
    mig-enabled: true
    mig-devices: {"7g.80gb": 1}
"""


def wanted(name: str) -> dict[int, tuple[bool, list[str]]]:
    found = targets(select(parse(FILE), name)[1], MACHINE)
    return {index: (target.mig_enabled, [each.name for each in target.profiles]) for index, target in found.items()}


def test_names_are_of_the_gpu_that_the_filter_finds() -> None:
    assert wanted("all-balanced") == {
        0: (True, ["1g.10gb", "1g.10gb", "2g.20gb", "3g.40gb"]),
        1: (True, ["1g.6gb", "1g.6gb", "2g.12gb"]),
    }


def test_all_means_all_that_have_mig() -> None:
    assert wanted("all-disabled") == {0: (False, []), 1: (False, [])}


def test_a_later_entry_wins() -> None:
    assert wanted("some") == {0: (True, ["1g.10gb+me"]), 1: (True, [])}


def test_a_filter_may_name_the_board() -> None:
    assert wanted("board") == {0: (True, ["7g.80gb"])}


def test_a_single_config_needs_no_name() -> None:
    only = "version: v1\nmig-configs: {x: [{devices: all, mig-enabled: false}]}"
    assert select(parse(only), None)[0] == "x"
    with pytest.raises(LayoutFileError, match="say which: all-disabled, all-balanced"):
        select(parse(FILE), None)
    with pytest.raises(LayoutFileError, match="did you mean all-balanced"):
        select(parse(FILE), "all-balance")


def entry(text: str) -> str:
    return f"version: v1\nmig-configs: {{x: [{text}]}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not YAML"),
        ("version: 2024-13-45", "not YAML: '2024-13-45' cannot be read: month"),
        ("[" * 3000, "not YAML: it is nested too deeply"),
        ("version: v1\nversion: v2", "not YAML: key version is given twice"),
        ("[]", "expected a mapping"),
        ("version: v2\nmig-configs: {x: [{devices: all, mig-enabled: false}]}", "version: Input should be 'v1'"),
        ("version: v1", "mig-configs: Field required"),
        ("version: v1\nmig-configs: {x: []}", "mig-configs.x: List should have at least 1 item"),
        (entry("{devices: all, mig-enabled: true, mig-device: {}}"), "unknown key; did you mean mig-devices"),
        (entry("{devices: all}"), "x.0.mig-enabled: Field required"),
        (entry("{devices: some, mig-enabled: true}"), "x.0.devices: "),
        (entry("{devices: [-1], mig-enabled: true}"), "greater than or equal to 0"),
        (entry('{devices: all, mig-enabled: "yes"}'), "valid boolean"),
        (entry("{devices: all, mig-enabled: false, mig-devices: {1g.10gb: 1}}"), "must be empty"),
        (entry("{devices: all, mig-enabled: true, mig-devices: {1g.10gb: 0}}"), "more than 0"),
        (entry("{devices: [7], mig-enabled: true}"), "names GPU 7; there are \\[0, 1, 2\\]"),
        (entry("{devices: [2], mig-enabled: true}"), "GPU 2 has no MIG"),
        (entry("{devices: [0], mig-enabled: true, mig-devices: {2g.12gb: 1}}"), "GPU 0: .*did you mean .*2g.20gb"),
        (entry("{devices: [0], mig-enabled: true, mig-devices: {3g.40gb: 3}}"), "GPU 0: .*9 compute slices"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(LayoutFileError, match=message):
        targets(select(parse(text), None)[1], MACHINE)


@given(st.sampled_from(maximal_multisets(A100)), st.sampled_from(maximal_multisets(A30)), st.booleans())
def test_what_is_exported_is_read_back(on_a100, on_a30, mig_on: bool) -> None:  # type: ignore[no-untyped-def]
    machine = {0: Target(True, on_a100), 1: Target(mig_on, on_a30 if mig_on else ())}
    name, entries = select(parse(export("now", machine)), None)
    assert name == "now"
    read = targets(entries, MACHINE)
    for index, target in machine.items():
        assert read[index].mig_enabled == target.mig_enabled
        assert sorted(each.name for each in read[index].profiles) == sorted(each.name for each in target.profiles)
