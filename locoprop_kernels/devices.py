"""What the schedule, the choice of configurations and ``bench.model`` assume of a GPU: one table of numbers.

A number says where it comes from in the comment above it: measured on such a machine, the vendor's documents, published
microbenchmarks, or a guess. Rates are of dense products. A measurement replaces an estimate here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from locoprop_kernels.epilogues import EPILOGUES, Issued

__all__ = ["DEVICES", "H100", "INTERPRETER", "UNKNOWN", "DeviceModel", "lookup"]


@dataclass(frozen=True)
class DeviceModel:
    """Rates, sizes and latencies of a GPU. All bytes, operations and seconds; rates are per second.

    The defaults are guesses made for an H100; an entry overrides them where something better is known of its device.

    Attributes:
        name: of the device, for people and for ``--device``.
        target: backend and architecture, as Triton and the table of configurations call it.
        multiprocessors: of the whole device (compute units on AMD).
        flops_bf16: products of bfloat16 and of float16. Costs of tiles assume this rate for every precision but float8.
        flops_tf32: products of TF32, or of float32 where matrix instructions keep all of its bits.
        flops_ieee: products of float32 with all of its bits.
        memory_bandwidth: bytes to and from the device's memory.
        cache_bandwidth: bytes out of the last cache that all multiprocessors share.
        cache_bytes: size of that cache.
        shared_bytes: the most shared memory that one program gets.
        flops_fp8: products of float8_e4m3fn with sums in float32; 0 where kernels have none.
        operand_bytes: of an operand's element, as costs of tiles take it; see :meth:`in_float8`.
        least_cache_bandwidth: the same, if the device is slower than is hoped; ``None`` where there is one estimate.
        clock: cycles of a multiprocessor.
        tile_efficiency: share of ``flops_bf16`` that a kernel reaches inside its tiles, if their operands come in time.
        matrix_rows: rows of a tile that one matrix instruction multiplies, for which it reads the other operand once.
        shared_bytes_per_cycle: of a multiprocessor's shared memory.
        issued_per_cycle: instructions for a lane that a multiprocessor issues.
        special_per_cycle: special functions (exponentials, reciprocals, square roots) that it computes.
        tile_latency: seconds of a tile in which nothing is computed: reads that wait for each other.
        multiprocessor_bandwidth: bytes out of the cache that one multiprocessor can take, if others leave them to it.
        wait: seconds from the last signal of the single launch to the first load of who waits for it.
        launch: seconds from the end of a launch to the first product of the next.
        host_launch: seconds that the host needs for a launch.
        start: seconds of a step before and after the loop: tables, copies, launches from Python.
        most_tiles_per_multiprocessor: the single launch takes no more. Beyond it a local step takes so long that two
            launches cost nothing, and the hardware's own queue balances better.
        other_epilogues: phases and what their epilogues issue, in place of what is known of the target.
    """

    name: str
    target: str
    multiprocessors: int
    flops_bf16: float
    flops_tf32: float
    flops_ieee: float
    memory_bandwidth: float
    cache_bandwidth: float
    cache_bytes: float
    shared_bytes: int
    flops_fp8: float = 0.0
    operand_bytes: int = 2
    least_cache_bandwidth: float | None = None
    # Published: an H100's under load.
    clock: float = 1.755e9
    # Guess: filling and draining the pipeline.
    tile_efficiency: float = 0.9
    # Guess, for matrix instructions whose operands are loaded into registers first.
    matrix_rows: int = 32
    # Vendor's programming guide, as the next two.
    shared_bytes_per_cycle: int = 128
    issued_per_cycle: int = 128
    special_per_cycle: int = 16
    # Counted: eight reads that wait for each other (list, record, counter, table, first operands, table again, what the
    # epilogue reads, and the end of all writes before the signal). Guess: each takes 0.3 µs under load.
    tile_latency: float = 2.4e-6
    # Guess: 64 bytes a clock, at 1.7 GHz.
    multiprocessor_bandwidth: float = 1.1e11
    # Guess: two round trips to the cache, with an atomic operation each.
    wait: float = 1.53e-6
    # Published for an H100: 1.3 µs from launch to launch. Guess: 1.5 µs to the first product.
    launch: float = 2.8e-6
    # Guess: Triton's launcher, called from Python.
    host_launch: float = 20.4e-6
    # Guess.
    start: float = 60e-6
    # Guess.
    most_tiles_per_multiprocessor: int = 64
    other_epilogues: tuple[tuple[str, Issued], ...] = ()

    def with_multiprocessors(self, count: int) -> DeviceModel:
        """This architecture with ``count`` multiprocessors, each as fast and as near to the cache as here."""
        if count == self.multiprocessors:
            return self
        share = count / self.multiprocessors
        return replace(
            self,
            multiprocessors=count,
            flops_bf16=share * self.flops_bf16,
            flops_tf32=share * self.flops_tf32,
            flops_ieee=share * self.flops_ieee,
            flops_fp8=share * self.flops_fp8,
            cache_bandwidth=share * self.cache_bandwidth,
            least_cache_bandwidth=self.least_cache_bandwidth and share * self.least_cache_bandwidth,
        )

    def in_float8(self) -> DeviceModel:
        """The device as costs of tiles with float8 operands see it: another rate, and operands of a byte."""
        return replace(self, flops_bf16=self.flops_fp8 or self.flops_bf16, operand_bytes=1)

    @property
    def pessimistic(self) -> DeviceModel:
        """This device with the least of the bandwidths that its cache may have."""
        return replace(self, cache_bandwidth=self.least_cache_bandwidth or self.cache_bandwidth)

    @property
    def epilogues(self) -> dict[str, Issued]:
        """What the epilogues of each phase issue for an element; where nothing is known of the target, as on sm_90."""
        return dict(self.other_epilogues) or EPILOGUES.get(self.target, EPILOGUES["sm_90"])

    @property
    def macs_per_second(self) -> float:
        """Multiply-accumulates of one multiprocessor inside its tiles."""
        return _rounded(self.flops_bf16 * self.tile_efficiency / self.multiprocessors / 2)

    @property
    def bytes_per_second(self) -> float:
        """Bytes out of the cache for one multiprocessor, if all take their share."""
        return _rounded(self.cache_bandwidth / self.multiprocessors)

    @property
    def bytes_per_mac(self) -> float:
        """Bytes out of the cache in the time of a multiply-accumulate."""
        return self.bytes_per_second / self.macs_per_second

    @property
    def wait_cost(self) -> int:
        """``wait`` in picoseconds, the unit of all costs."""
        return round(self.wait * 1e12)

    @property
    def round_trip(self) -> float:
        """Seconds from a load to the number from the cache."""
        return self.wait / 2

    @property
    def launch_cost(self) -> int:
        """``launch`` in picoseconds."""
        return round(self.launch * 1e12)

    @property
    def host_launch_cost(self) -> int:
        """``host_launch`` in picoseconds."""
        return round(self.host_launch * 1e12)


def _rounded(value: float) -> float:
    """To four digits, so that a part of a device has the rates of the whole to the last bit."""
    return float(f"{value:.3e}")


H100 = DeviceModel(
    name="H100",
    target="sm_90",
    # Vendor's datasheet, of the SXM module.
    multiprocessors=132,
    flops_tf32=495e12,
    flops_ieee=67e12,
    cache_bytes=50e6,
    # Measured on such machines: products with cuBLAS, and copies.
    flops_bf16=798e12,
    # Guess: twice the measured rate of bfloat16, as in the datasheet.
    flops_fp8=1596e12,
    memory_bandwidth=3.0e12,
    # Published: kernels with tiles of 128 x 256 and no multicast multiply 650 to 670 TFLOP/s, which needs as much; and
    # what microbenchmarks have measured.
    cache_bandwidth=7.9e12,
    least_cache_bandwidth=5.5e12,
    # Vendor's programming guide, as for all of the vendor's devices below.
    shared_bytes=227 * 1024,
    # Instructions of a warp group have 64 rows.
    matrix_rows=64,
)

#: Every GPU that there are numbers for. Where several have one target, the first stands for it.
DEVICES = (
    DeviceModel(
        name="A100",
        target="sm_80",
        # Vendor's datasheet, of the SXM module with 80 GB.
        multiprocessors=108,
        flops_bf16=312e12,
        flops_tf32=156e12,
        flops_ieee=19.5e12,
        memory_bandwidth=2.04e12,
        cache_bytes=40e6,
        # Guess: as much for each multiprocessor as microbenchmarks found on an H100.
        cache_bandwidth=4.5e12,
        shared_bytes=163 * 1024,
        # Vendor's datasheet: the highest.
        clock=1.41e9,
    ),
    DeviceModel(
        name="A40",
        target="sm_86",
        # Vendor's datasheet.
        multiprocessors=84,
        flops_bf16=150e12,
        flops_tf32=75e12,
        flops_ieee=37.4e12,
        memory_bandwidth=0.696e12,
        cache_bytes=6e6,
        # Guess: as much for each multiprocessor as microbenchmarks found on an H100.
        cache_bandwidth=3.5e12,
        shared_bytes=99 * 1024,
        # Vendor's datasheet: the highest.
        clock=1.74e9,
    ),
    DeviceModel(
        name="L40S",
        target="sm_89",
        # Vendor's datasheet.
        multiprocessors=142,
        flops_bf16=362e12,
        flops_fp8=733e12,
        flops_tf32=183e12,
        flops_ieee=91.6e12,
        memory_bandwidth=0.864e12,
        cache_bytes=96e6,
        # Guess: as much for each multiprocessor as microbenchmarks found on an H100.
        cache_bandwidth=5.9e12,
        shared_bytes=99 * 1024,
        # Vendor's datasheet: the highest.
        clock=2.52e9,
    ),
    H100,
    replace(
        H100,
        name="H200",
        # Measured on such machines: copies. Its products are as fast as an H100's.
        memory_bandwidth=4.3e12,
        # What the device reports.
        cache_bytes=60e6,
    ),
    DeviceModel(
        name="B200",
        target="sm_100",
        # Vendor's technical brief.
        flops_bf16=2250e12,
        flops_fp8=4500e12,
        flops_tf32=1125e12,
        memory_bandwidth=7.7e12,
        # Published: 148 multiprocessors, 126 MB of cache, and float32 from clock and cores.
        multiprocessors=148,
        flops_ieee=75e12,
        cache_bytes=126e6,
        # Guess: two dies, each as an H100 in the worst case.
        cache_bandwidth=11e12,
        shared_bytes=227 * 1024,
        matrix_rows=128,
        # Guess.
        clock=1.85e9,
    ),
    DeviceModel(
        name="B300",
        target="sm_103",
        # Vendor's datasheet.
        flops_bf16=2250e12,
        flops_fp8=4500e12,
        flops_tf32=1125e12,
        memory_bandwidth=8.0e12,
        # Guesses: as of a B200.
        multiprocessors=148,
        flops_ieee=75e12,
        cache_bytes=126e6,
        cache_bandwidth=11e12,
        shared_bytes=227 * 1024,
        matrix_rows=128,
        # Guess.
        clock=1.85e9,
    ),
    DeviceModel(
        name="RTX-5090",
        target="sm_120",
        # Vendor's white paper, with sums in float32.
        multiprocessors=170,
        flops_bf16=209.5e12,
        flops_fp8=419e12,
        flops_tf32=104.8e12,
        flops_ieee=104.8e12,
        memory_bandwidth=1.79e12,
        cache_bytes=96e6,
        # Guess: as much for each multiprocessor as microbenchmarks found on an H100.
        cache_bandwidth=7.1e12,
        shared_bytes=99 * 1024,
        # Vendor's datasheet: the highest.
        clock=2.41e9,
    ),
    DeviceModel(
        name="MI250X",
        target="gfx90a",
        # Vendor's datasheet, of one of the module's two devices.
        multiprocessors=110,
        flops_bf16=191.5e12,
        flops_tf32=47.9e12,
        flops_ieee=47.9e12,
        memory_bandwidth=1.6e12,
        cache_bytes=8e6,
        # Guess: as much for each compute unit as microbenchmarks found for a multiprocessor of an H100.
        cache_bandwidth=4.6e12,
        # Vendor's documentation, as for all of the vendor's devices below: the local data share of a workgroup.
        shared_bytes=64 * 1024,
        # Vendor's datasheet: the highest.
        clock=1.7e9,
        # Vendor's documentation: four units of 16 lanes.
        issued_per_cycle=64,
    ),
    DeviceModel(
        name="MI300X",
        target="gfx942",
        # Vendor's datasheet. Matrix instructions of TF32 exist, but no kernel uses them.
        multiprocessors=304,
        flops_bf16=1307e12,
        flops_tf32=163.4e12,
        flops_ieee=163.4e12,
        memory_bandwidth=5.3e12,
        # Vendor's white paper: the Infinity Cache, at its peak; the L2 caches serve a die each.
        cache_bytes=256e6,
        cache_bandwidth=17.2e12,
        shared_bytes=64 * 1024,
        # Vendor's datasheet: the highest.
        clock=2.1e9,
        # Vendor's documentation: four units of 16 lanes.
        issued_per_cycle=64,
    ),
    DeviceModel(
        name="MI355X",
        target="gfx950",
        # Vendor's datasheet.
        multiprocessors=256,
        flops_bf16=2500e12,
        flops_tf32=157.3e12,
        flops_ieee=157.3e12,
        memory_bandwidth=8.0e12,
        cache_bytes=256e6,
        # Guess: as of an MI300X.
        cache_bandwidth=17.2e12,
        shared_bytes=160 * 1024,
        # Vendor's datasheet: the highest.
        clock=2.4e9,
        # Vendor's documentation: four units of 16 lanes.
        issued_per_cycle=64,
    ),
)

#: Programs run one after another; nothing is known of their speed, so an H100's decisions are what is tested.
INTERPRETER = replace(H100.with_multiprocessors(1), name="interpreter", target="interpreter")
#: Guess: as an H100, with the least shared memory of all.
UNKNOWN = replace(H100, name="unknown", target="unknown", shared_bytes=64 * 1024)


@lru_cache(maxsize=64)
def lookup(target: str, multiprocessors: int | None = None) -> DeviceModel:
    """The model of a target, :data:`UNKNOWN` if there is none.

    Args:
        target: ``"sm_90"``, ``"gfx942"``, ``"interpreter"``, ...
        multiprocessors: what the device at hand reports, where that is known.
    """
    found = next((device for device in (*DEVICES, INTERPRETER) if device.target == target), UNKNOWN)
    return found if multiprocessors is None else found.with_multiprocessors(multiprocessors)
