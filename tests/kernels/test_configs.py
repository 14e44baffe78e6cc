"""The choice of tile sizes and driver: a pure function of sizes."""

import dataclasses
import itertools

import pytest

pytest.importorskip("triton")

from locoprop_kernels import schedule
from locoprop_kernels.devices import DEVICES, H100
from locoprop_kernels.kernels import configs
from locoprop_kernels.kernels.choose import choose, gram_pays, predicted
from locoprop_kernels.kernels.configs import Config

NARROW = Config(n=128, b=64, k=64, r=64)
WIDE = Config(n=128, b=256, k=256, r=64, slices=8, driver="grouped")
WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)


def autoencoder(batch):
    return tuple((batch, k, n) for k, n in itertools.pairwise(WIDTHS))


def test_few_examples_take_small_tiles_and_the_single_launch():
    assert choose((WIDE, NARROW), autoencoder(100), "product", 2, H100)[:2] == (NARROW, 132)


def test_wide_layers_take_large_tiles_in_launches_per_phase():
    wide = ((8192, 4096, 4096),)
    assert choose((NARROW, WIDE), wide, "product", 2, H100)[:2] == (WIDE, 0)
    # Not where its kernels would spill registers.
    assert choose((NARROW, WIDE), wide, "product", 3, H100).config == NARROW
    assert choose((NARROW, WIDE), wide, "softmax", 2, H100).config == NARROW


def test_a_convolution_is_not_left_to_a_few_programs():
    """Its update tiles are few; only launches per phase can cut its batch."""
    config, programs, splits, _ = choose((NARROW,), ((131_072, 27, 32),), "product", 2, H100)
    assert programs == 0
    assert splits == schedule.splits([(131_072, 27, 32)], config.tiles, 132)
    single = predicted(config, "single", ((131_072, 27, 32),), "product", H100)
    assert predicted(config, "grouped", ((131_072, 27, 32),), "product", H100) < single / 4


@pytest.mark.parametrize("form", ["gram", "softmax"])
def test_other_forms_have_no_single_launch(form):
    assert choose((NARROW,), autoencoder(100), form, 2, H100, "single").programs == 0


@pytest.mark.parametrize("driver", ["single", "grouped"])
def test_a_driver_that_is_asked_for_is_taken(driver):
    for layers in (autoencoder(100), ((8192, 4096, 4096),)):
        choice = choose((NARROW, WIDE), layers, "product", 2, H100, driver)
        assert (choice.programs > 0) == (driver == "single")


def test_very_many_tiles_are_left_to_the_hardwares_queue():
    assert choose((NARROW,), ((65_536, 8192, 8192),), "product", 2, H100).programs == 0


def test_every_target_has_a_configuration_of_each_precision():
    for target in (*(device.target for device in DEVICES), "sm_75"):
        for precision in ("fp8", "bf16", "fp16", "tf32", "ieee"):
            found = configs.candidates(target, precision)
            assert found
            assert len(set(found)) == len(found)
            assert any(config.general for config in found)
            assert all(config.slices in (1, 2, 4, 8) for config in found)


def test_a_small_gram_form_is_not_worth_its_launches():
    found = (NARROW, WIDE)
    assert not gram_pays(found, ((1000, 250, 30),), 10, 2, H100)  # the code of the paper's autoencoder
    assert gram_pays(found, autoencoder(1000), 10, 2, H100)  # LocoProp-S
    assert gram_pays(found, ((65_536, 768, 768),), 10, 2, H100)


def test_a_small_step_is_not_left_to_a_slow_host():
    small = ((1000, 256, 256),)
    assert choose((NARROW, WIDE), small, "product", 2, H100).programs == 132
    assert predicted(NARROW, "grouped", small, "product", H100) == 2 * H100.host_launch_cost


def test_the_loads_of_every_configuration_fit_into_the_shared_memory():
    for device in DEVICES:
        for precision, itemsize in (("fp8", 1), ("bf16", 2), ("fp16", 2), ("tf32", 4), ("ieee", 4)):
            if precision == "tf32" and device.target.startswith("gfx"):  # has no kernels
                continue
            for config in configs.candidates(device.target, precision):
                pipeline = config.stages * (config.n + max(config.b, config.k)) * config.r * itemsize
                assert pipeline <= device.shared_bytes, (device.name, precision, config)


@pytest.mark.parametrize(
    ("change", "driver", "layers"),
    [
        ({"cache_bandwidth": 2e12}, "single", ((8192, 4096, 4096),)),
        ({"cache_bandwidth": 2e12}, "grouped", ((8192, 4096, 4096),)),
        ({"clock": 1e9}, "grouped", ((8192, 4096, 4096),)),
        ({"shared_bytes_per_cycle": 32}, "single", ((8192, 4096, 4096),)),
        ({"issued_per_cycle": 64}, "single", autoencoder(1000)),
        ({"special_per_cycle": 4}, "single", autoencoder(1000)),
        ({"tile_latency": 1e-5}, "single", autoencoder(1000)),
        ({"wait": 1e-4}, "single", autoencoder(100)),
        ({"launch": 1e-3}, "grouped", autoencoder(1000)),
        ({"host_launch": 1e-2}, "grouped", autoencoder(1000)),
        ({"flops_bf16": 2e14}, "grouped", autoencoder(1000)),
        ({"tile_efficiency": 0.3}, "single", autoencoder(1000)),
        ({"multiprocessors": 66}, "single", autoencoder(1000)),
    ],
    ids=str,
)
def test_predictions_follow_the_device(change, driver, layers):
    """Of a device that is slower in something."""
    device = dataclasses.replace(H100, **change)
    assert predicted(NARROW, driver, layers, "product", device) > predicted(NARROW, driver, layers, "product", H100)


def test_decisions_follow_the_device():
    wide, small = ((8192, 4096, 4096),), ((1000, 256, 256),)
    slow_host = dataclasses.replace(H100, host_launch=0.1)
    assert choose((NARROW,), wide, "product", 2, slow_host).programs == 132
    assert not gram_pays((NARROW,), autoencoder(1000), 10, 2, slow_host)
    slow_counters = dataclasses.replace(H100, wait=0.1)
    assert choose((NARROW,), small, "product", 2, slow_counters).programs == 0
    few_tiles = dataclasses.replace(H100, most_tiles_per_multiprocessor=0)
    assert choose((NARROW,), small, "product", 2, few_tiles).programs == 0
    assert choose((NARROW,), small, "product", 2, H100.with_multiprocessors(66)).programs == 66


def test_programs_that_should_be_resident_at_once_fit():
    """Registers and shared memory of a Hopper multiprocessor: 64 Ki and 228 KiB, 1 KiB of it for each program."""
    for precision, itemsize in (("fp8", 1), ("bf16", 2), ("fp16", 2), ("tf32", 4), ("ieee", 4)):
        for config in configs.candidates("sm_90", precision):
            assert config.occupancy * config.warps * 32 * 256 <= 65536
            pipeline = config.stages * (config.n + max(config.b, config.k)) * config.r * itemsize
            assert config.occupancy * (pipeline + 1024) <= 228 * 1024


def test_two_programs_on_a_multiprocessor_are_counted_as_such():
    narrow = dataclasses.replace(NARROW, occupancy=2)
    assert choose((narrow,), autoencoder(100), "product", 2, H100, "single").programs == 264
    # Half as fast each, but the products of one hide the epilogues of the other.
    once, twice = (predicted(one, "single", autoencoder(1000), "product", H100) for one in (NARROW, narrow))
    assert 0.6 < twice / once < 0.9
    # Not if there are only products.
    bare = dataclasses.replace(H100, tile_latency=0.0, issued_per_cycle=10**9, special_per_cycle=10**9)
    wide = ((8192, 4096, 4096),)
    once, twice = (predicted(one, "single", wide, "product", bare) for one in (NARROW, narrow))
    assert 0.95 < twice / once < 1.05


def test_the_search_for_tiles_proposes_valid_configurations():
    from bench import tune

    shapes = tune.shapes()
    assert len(shapes) > 10
    for precision in ("bf16", "fp16", "tf32", "ieee"):
        assert any(list(tune.options(shape, precision, 200_000)) for shape in shapes)


def test_masked_kernels_take_configurations_that_all_kernels_may_use():
    for target, precision in (("sm_90", "bf16"), ("sm_80", "ieee"), ("gfx942", "bf16"), ("interpreter", "ieee")):
        masked = configs.candidates(target, precision, lean=True)
        assert masked
        assert all(config.general for config in masked)
    assert configs.candidates("sm_90", "bf16", lean=True) != configs.candidates("sm_90", "bf16")
