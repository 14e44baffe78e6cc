"""The choice of tile sizes and driver: a pure function of sizes."""

import dataclasses
import itertools

import pytest

pytest.importorskip("triton")

from locoprop_kernels import schedule
from locoprop_kernels.kernels import configs
from locoprop_kernels.kernels.configs import Config

NARROW = Config(n=128, b=64, k=64, r=64)
WIDE = Config(n=128, b=256, k=256, r=64, parts=8, general=False)
WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)


def autoencoder(batch):
    return tuple((batch, k, n) for k, n in itertools.pairwise(WIDTHS))


def test_few_examples_take_small_tiles_and_the_single_launch():
    assert configs.choose((WIDE, NARROW), autoencoder(100), "product", 2, 132)[:2] == (NARROW, 132)


def test_wide_layers_take_large_tiles_in_launches_per_phase():
    wide = ((8192, 4096, 4096),)
    assert configs.choose((NARROW, WIDE), wide, "product", 2, 132)[:2] == (WIDE, 0)
    # Not where its kernels would spill registers.
    assert configs.choose((NARROW, WIDE), wide, "product", 3, 132).config == NARROW
    assert configs.choose((NARROW, WIDE), wide, "softmax", 2, 132).config == NARROW


def test_a_convolution_is_not_left_to_a_few_programs():
    """Its update tiles are few; only launches per phase can cut its batch."""
    config, programs, splits = configs.choose((NARROW,), ((131_072, 27, 32),), "product", 2, 132)
    assert programs == 0
    assert splits == schedule.splits([(131_072, 27, 32)], config.tiles, 132)
    single = configs.predicted(config, "single", ((131_072, 27, 32),), "product", 132)
    assert configs.predicted(config, "grouped", ((131_072, 27, 32),), "product", 132) < single / 4


@pytest.mark.parametrize("form", ["gram", "softmax"])
def test_other_forms_have_no_single_launch(form):
    assert configs.choose((NARROW,), autoencoder(100), form, 2, 132, "single").programs == 0


@pytest.mark.parametrize("driver", ["single", "grouped"])
def test_a_driver_that_is_asked_for_is_taken(driver):
    for layers in (autoencoder(100), ((8192, 4096, 4096),)):
        choice = configs.choose((NARROW, WIDE), layers, "product", 2, 132, driver)
        assert (choice.programs > 0) == (driver == "single")


def test_very_many_tiles_are_left_to_the_hardwares_queue():
    assert configs.choose((NARROW,), ((65_536, 8192, 8192),), "product", 2, 132).programs == 0


def test_every_target_has_a_configuration_of_each_precision():
    for target in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "sm_75"):
        for precision in ("bf16", "fp16", "tf32", "ieee"):
            found = configs.candidates(target, precision)
            assert found
            assert len(set(found)) == len(found)
            assert any(config.general for config in found)
            assert all(config.parts in (1, 2, 4, 8) for config in found)


def test_a_small_gram_form_is_not_worth_its_launches():
    found = (NARROW, WIDE)
    assert not configs.gram_pays(found, ((1000, 250, 30),), 10, 2, 132)  # the code of the paper's autoencoder
    assert configs.gram_pays(found, autoencoder(1000), 10, 2, 132)  # LocoProp-S
    assert configs.gram_pays(found, ((65_536, 768, 768),), 10, 2, 132)


def test_a_small_step_is_not_left_to_a_slow_host():
    small = ((1000, 256, 256),)
    assert configs.choose((NARROW, WIDE), small, "product", 2, 132).programs == 132
    assert configs.predicted(NARROW, "grouped", small, "product", 132) == 2 * schedule.HOST_LAUNCH


def test_programs_that_should_be_resident_at_once_fit():
    """Registers and shared memory of a Hopper multiprocessor: 64 Ki and 228 KiB, 1 KiB of it for each program."""
    for precision, itemsize in (("bf16", 2), ("fp16", 2), ("tf32", 4), ("ieee", 4)):
        for config in configs.candidates("sm_90", precision):
            assert config.occupancy * config.warps * 32 * 256 <= 65536
            pipeline = config.stages * (config.n + max(config.b, config.k)) * config.r * itemsize
            assert config.occupancy * (pipeline + 1024) <= 228 * 1024


def test_two_programs_on_a_multiprocessor_are_counted_as_such():
    narrow = dataclasses.replace(NARROW, occupancy=2)
    assert configs.choose((narrow,), autoencoder(100), "product", 2, 132, "single").programs == 264
    # Half as fast each: about the same time, which waits for the longest queue of smaller shares.
    once, twice = (configs.predicted(one, "single", autoencoder(1000), "product", 132) for one in (NARROW, narrow))
    assert 0.8 < twice / once < 1.25


def test_the_search_for_tiles_proposes_valid_configurations():
    from bench import tune

    shapes = tune.shapes()
    assert len(shapes) > 10
    for precision in ("bf16", "fp16", "tf32", "ieee"):
        assert any(list(tune.options(shape, precision, 200_000)) for shape in shapes)


def test_masked_kernels_have_configurations_of_their_own():
    for target, precision in (("sm_90", "bf16"), ("sm_100", "fp16"), ("gfx942", "bf16"), ("interpreter", "ieee")):
        masked = configs.candidates(target, precision, masked=True)
        assert masked
        assert all(config.general for config in masked)
    assert configs.candidates("sm_100", "fp16", masked=True) != configs.candidates("sm_100", "fp16")
