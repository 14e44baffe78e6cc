"""Ways to run interpreted kernels that bring hidden faults to light.

Needs ``TRITON_INTERPRET=1``. The interpreter runs the programs of a launch one after another, on real memory. Here they
run concurrently in forked processes, in any order, or with every address checked.
"""

import contextlib
import gc
import os
import random
import signal
import tempfile
import time
import traceback

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from triton.runtime.interpreter import GridExecutor, interpreter_builder

ACCESSES = ("create_masked_load", "create_masked_store", "create_atomic_cas", "create_atomic_rmw")


@contextlib.contextmanager
def replaced(owner, name, wrap):
    """``owner.name`` is ``wrap(owner.name)`` for a while."""
    original, own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


class SharedAllocations(TorchFunctionMode):
    """Moves every tensor to shared memory as it is made, before anyone has asked for its address."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor) and not tensor.is_shared() and tensor.numel():
                    tensor.share_memory_()
        return result


@contextlib.contextmanager
def concurrent_programs(kernels, seed, timeout=60.0, delay=2e-3):
    """Launches of the named kernels run one process per program, with random delays; other launches as usual.

    All tensors that they use must be in shared memory: make them under :class:`SharedAllocations`.

    Yields a list of the numbers of programs of the launches so far.

    Raises:
        TimeoutError: the programs have not all ended after ``timeout`` seconds; they are killed.
        RuntimeError: a program failed; has its traceback.
    """
    launches: list[int] = []

    def wrap(call):
        def launch(self, *args, **kwargs):
            if self.fn.__name__ not in kernels:
                return call(self, *args, **kwargs)
            assert not callable(self.grid), "a grid of numbers is expected"
            assert all(size == 1 for size in self.grid[1:]), "a grid of one dimension is expected"
            launches.append(self.grid[0])
            _run_all(lambda: call(self, *args, **kwargs), self.grid[0], f"{seed}/{len(launches)}", timeout, delay)
            return None

        return launch

    with replaced(GridExecutor, "__call__", wrap):
        yield launches


def _run_all(launch, programs, seed, timeout, delay):
    with tempfile.TemporaryFile("w+") as errors:
        children = {}
        try:
            for program in range(programs):
                pid = os.fork()
                if pid == 0:
                    _child(launch, program, programs, random.Random(f"{seed}/{program}"), delay, errors)
                children[pid] = program
            _wait(children, time.monotonic() + timeout)
        except ChildProcessError as error:
            errors.seek(0)
            raise RuntimeError(f"{error}\n{errors.read()}") from None
        finally:
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)


def _wait(children, deadline):
    """Until all children have ended; those that have leave the dictionary."""
    while children:
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                program = children.pop(pid)
                if status:
                    raise ChildProcessError(f"program {program} failed")
        if time.monotonic() > deadline:
            raise TimeoutError(f"programs {sorted(children.values())} have not ended")
        time.sleep(1e-3)


def _child(launch, program, programs, rng, delay, errors):
    """One program, then the end of the process, whatever happens."""
    try:
        interpreter_builder.set_grid_dim = lambda *_: setattr(interpreter_builder, "grid_dim", (programs, 1, 1))
        # The launch goes through the whole grid; only this program's turn counts.
        call = _OnlyOnce(program)
        interpreter_builder.set_grid_idx = call
        # It copies every argument onto itself at the end, which would undo what others have written meanwhile.
        GridExecutor._restore_args_dev = lambda *_: None
        slowness = rng.choice([0.0, 0.02, 0.2])
        for name in ACCESSES:
            setattr(interpreter_builder, name, _delayed(getattr(interpreter_builder, name), rng, slowness, delay))
        time.sleep(rng.random() * 4 * delay)
        with contextlib.suppress(_Finished):
            launch()
        os._exit(0)
    except BaseException:
        traceback.print_exc(file=errors)
        errors.flush()
        os._exit(1)


class _Finished(BaseException):
    """The program has run."""


class _OnlyOnce:
    def __init__(self, program):
        self.program = program
        self.started = False

    def __call__(self, *_):
        if self.started:
            raise _Finished
        self.started = True
        interpreter_builder.grid_idx = (self.program, 0, 0)


def _delayed(access, rng, slowness, delay):
    def wrapper(*args, **kwargs):
        if rng.random() < slowness:
            time.sleep(rng.random() * delay)
        result = access(*args, **kwargs)
        if access.__name__.startswith("create_atomic"):
            time.sleep(1e-5)  # let others run when this one polls
        return result

    return wrapper


@contextlib.contextmanager
def shuffled_programs(seed):
    """Programs of every launch run in a random order.

    Yields a list of the orders so far.
    """
    rng, orders = random.Random(seed), []

    def wrap(set_grid_idx):
        turn = iter(())

        def shuffled(x, y, z):
            nonlocal turn
            grid = interpreter_builder.grid_dim
            if (x, y, z) == (0, 0, 0):
                order = list(np.ndindex(*grid))
                rng.shuffle(order)
                orders.append(order)
                turn = iter(order)
            set_grid_idx(*next(turn))

        return shuffled

    with replaced(interpreter_builder, "set_grid_idx", wrap):
        yield orders


class OutOfBounds(AssertionError):
    """A kernel touched memory that belongs to no tensor, or two tensors' in one access."""


@contextlib.contextmanager
def checked_addresses(forbidden=()):
    """Every load, store and atomic of interpreted kernels must stay within one live tensor's storage, and be aligned.

    Args:
        forbidden: address ranges ``(start, end)`` inside tensors that must not be touched; may grow meanwhile.

    Yields a dictionary that counts ``launches`` and ``accesses``.

    Raises:
        OutOfBounds: from the launch, as the cause of the interpreter's error.
    """
    storages: list[tuple[int, int]] = []
    counts = {"launches": 0, "accesses": 0}

    def rescan(set_grid_dim):
        def wrapper(*grid):
            storages[:] = _live_storages()
            counts["launches"] += 1
            set_grid_dim(*grid)

        return wrapper

    def check(access):
        pointer_position, mask_position = _POSITIONS[access.__name__]

        def wrapper(*args):
            pointers = args[pointer_position]
            addresses = np.asarray(pointers.data)
            if mask_position is not None:
                addresses = addresses[np.broadcast_to(args[mask_position].data, addresses.shape).astype(bool)]
            counts["accesses"] += addresses.size
            _check(addresses, pointers.get_element_ty().primitive_bitwidth // 8, storages, forbidden)
            return access(*args)

        return wrapper

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(interpreter_builder, "set_grid_dim", rescan))
        for name in ACCESSES:
            stack.enter_context(replaced(interpreter_builder, name, check))
        yield counts


# Where the builder's functions take the pointers and the mask.
_POSITIONS = {
    "create_masked_load": (0, 1),
    "create_masked_store": (0, 2),
    "create_atomic_cas": (0, None),
    "create_atomic_rmw": (1, 3),
}


def _check(addresses, size, storages, forbidden):
    if not addresses.size:
        return
    low, high = int(addresses.min()), int(addresses.max()) + size
    if not any(start <= low and high <= end for start, end in storages):
        raise OutOfBounds(f"an access to [{low:#x}, {high:#x}) lies in no tensor")
    if any(low < end and start < high for start, end in forbidden):
        raise OutOfBounds(f"an access to [{low:#x}, {high:#x}) reaches into forbidden memory")
    if (addresses % size).any():
        raise OutOfBounds(f"a misaligned access to {size}-byte elements at {low:#x}")


def _live_storages():
    found = set()
    for candidate in gc.get_objects():
        # isinstance() would ask the object, and some answer with a deprecation warning.
        if not issubclass(type(candidate), torch.Tensor):
            continue
        if candidate.device.type == "cpu" and candidate.layout == torch.strided:
            # Tensors that a tracer or a transform of torch has left behind have no memory, and say so when asked.
            with contextlib.suppress(RuntimeError):
                storage = candidate.untyped_storage()
                size = storage.nbytes()
                if isinstance(size, int):  # that of a tracer's own tensor may be a symbol
                    found.add((storage.data_ptr(), storage.data_ptr() + size))
    return sorted(found)
