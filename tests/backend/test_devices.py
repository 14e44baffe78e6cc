"""The table of GPUs: what costs are derived from, and that they do not hang on the number of multiprocessors."""

import pytest

from locoprop_kernels import devices
from locoprop_kernels.devices import DEVICES, H100, INTERPRETER, UNKNOWN, lookup
from locoprop_kernels.epilogues import EPILOGUES

EVERY = (*DEVICES, INTERPRETER, UNKNOWN)
# Multiprocessors, and the most shared memory of a program in KiB.
EXPECTED = {
    "sm_80": ("A100", 108, 163),
    "sm_86": ("A40", 84, 99),
    "sm_89": ("L40S", 142, 99),
    "sm_90": ("H100", 132, 227),
    "sm_100": ("B200", 148, 227),
    "sm_103": ("B300", 148, 227),
    "sm_120": ("RTX-5090", 170, 99),
    "gfx90a": ("MI250X", 110, 64),
    "gfx942": ("MI300X", 304, 64),
    "gfx950": ("MI355X", 256, 160),
}


def costs(device):
    overheads = device.wait_cost, device.launch_cost, device.host_launch_cost
    return device.macs_per_second, device.bytes_per_second, device.pessimistic.bytes_per_second, *overheads


def test_every_target_is_found():
    assert {device.target for device in DEVICES} == set(EXPECTED)
    for target, (name, multiprocessors, kibibytes) in EXPECTED.items():
        device = lookup(target)
        assert (device.name, device.target, device.multiprocessors) == (name, target, multiprocessors)
        assert device.shared_bytes == 1024 * kibibytes
    assert lookup("interpreter") == INTERPRETER
    assert lookup("sm_75") == lookup("gfx1100") == UNKNOWN
    assert len({device.name for device in EVERY}) == len(EVERY)


@pytest.mark.parametrize("device", EVERY, ids=lambda device: device.name)
def test_numbers_are_in_the_units_they_should_have(device):
    """A rate a thousand times off, or microseconds for seconds, is outside of these."""
    assert 1e13 < device.with_multiprocessors(100).flops_bf16 < 1e16
    assert device.flops_ieee <= device.flops_tf32 <= device.flops_bf16
    assert 1e11 < device.memory_bandwidth < 1e13
    assert 1e10 < device.with_multiprocessors(1).cache_bandwidth < 1e11
    assert device.memory_bandwidth < device.cache_bandwidth or device is INTERPRETER
    assert 1e6 < device.cache_bytes < 1e9
    assert 0 < device.tile_efficiency < 1
    assert 1e9 < device.clock < 4e9
    # The matrix unit's rate: what a multiprocessor multiplies in a cycle is some power of two, less what is lost.
    assert 200 < device.flops_bf16 / device.multiprocessors / device.clock < 16384
    assert device.pessimistic.cache_bandwidth <= device.cache_bandwidth
    assert 1e-7 < device.tile_latency < 1e-5
    assert 1e-7 < device.wait < device.launch < device.host_launch < device.start < 1e-3
    assert 0 < device.wait_cost < device.launch_cost < device.host_launch_cost


def test_costs_on_an_h100():
    """What tiles were chosen by: 90 % of 798 TFLOP/s on 132 multiprocessors, 7.9 or 5.5 TB/s, 1.5, 2.8 and 20 µs."""
    assert costs(H100) == (2.72e12, 5.985e10, 4.167e10, 1_530_000, 2_800_000, 20_400_000)
    assert costs(INTERPRETER) == costs(UNKNOWN) == costs(lookup("sm_90")) == costs(H100)


@pytest.mark.parametrize("device", EVERY, ids=lambda device: device.name)
@pytest.mark.parametrize("count", [1, 8, 78, 1000])
def test_parts_of_an_architecture_have_the_same_costs(device, count):
    smaller = device.with_multiprocessors(count)
    assert smaller.multiprocessors == lookup(device.target, count).multiprocessors == count
    assert costs(smaller) == costs(device)
    assert smaller.memory_bandwidth == device.memory_bandwidth
    assert device.with_multiprocessors(device.multiprocessors) is device


@pytest.mark.parametrize("target", EPILOGUES)
def test_epilogues_are_counted_for_every_target(target):
    assert set(EPILOGUES) == set(EXPECTED)
    counts = lookup(target).epilogues
    assert set(counts) == {"activation", "update"}
    for issued in counts.values():
        # An element takes more than its special functions, and no more than a few functions written out.
        assert issued.special < issued.instructions < 150
    assert UNKNOWN.epilogues == H100.epilogues
    other = devices.replace(H100, other_epilogues=(("activation", counts["update"]), ("update", counts["update"])))
    assert other.epilogues["activation"] == counts["update"]


def test_devices_of_one_target_share_its_first_entry():
    h200 = next(device for device in DEVICES if device.name == "H200")
    assert h200.target == "sm_90"
    assert lookup("sm_90") is devices.H100
    assert h200.memory_bandwidth > H100.memory_bandwidth
