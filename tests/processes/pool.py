"""Processes that wait for functions to run together, so that tests need not start new ones for each situation."""

import contextlib
import multiprocessing
import queue
import socket
import traceback
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers import compile_kernels

__all__ = ["Pool", "free_port"]

#: After which a process that waits for another one raises.
PATIENCE = 20.0
# For the first import of torch, on a machine that others use too.
_STARTING = 180.0
_PRELOADED = ["torch", "torch.distributed", "torch.distributed.tensor", "locoprop_torch", "tests.processes.pool"]


def free_port():
    """A port of this host that nobody listens to."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Pool:
    """``size`` processes of a group, of gloo; with NCCL each of them has the GPU with its number.

    A function runs in all of them, as ``function(rank, *arguments)``; it and its arguments can be pickled.
    """

    def __init__(self, size, backend="gloo"):
        self.size, self._backend = size, backend
        self._processes = []

    def run(self, function, *arguments):
        """What the function returned in each process, by rank.

        Raises:
            AssertionError: it raised in one of them, or one of them has died or takes too long.
        """
        if not all(process.is_alive() for process in self._processes) or not self._processes:
            self._start()
        for tasks in self._tasks:
            tasks.put((function, arguments))
        found: dict[int, tuple[str | None, Any]] = {}
        try:
            while len(found) < self.size:
                rank, text, value = self._results.get(timeout=2 * PATIENCE)
                found[rank] = (text, value)
        except queue.Empty:
            raise AssertionError(f"only processes {sorted(found)} of {self.size} have answered in time") from None
        finally:
            # After a failure the processes may wait for each other.
            if len(found) < self.size or any(text for text, _ in found.values()):
                self.stop()
        for rank, (text, _) in sorted(found.items()):
            assert text is None, f"process {rank}:\n{text}"
        return [found[rank][1] for rank in range(self.size)]

    def run_until_first(self, function, *arguments):
        """What the function returned in the first process that did, whatever happens to the others."""
        self.begin(function, *arguments)
        _, text, value = self._results.get(timeout=2 * PATIENCE)
        assert text is None, text
        return value

    def begin(self, function, *arguments):
        """Let new processes run the function, and do not wait for them."""
        self._start()
        for tasks in self._tasks:
            tasks.put((function, arguments))

    def check(self):
        """Raise an ``AssertionError`` if the function that has begun has raised in a process so far."""
        with contextlib.suppress(queue.Empty):
            rank, text, _ = self._results.get_nowait()
            assert text is None, f"process {rank}:\n{text}"

    def _start(self):
        self.stop()
        compile_kernels()
        # Its children have torch imported, and no threads of a parent that has used torch.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._results = context.Queue()
        self._tasks = [context.Queue() for _ in range(self.size)]
        port = free_port()
        for rank, tasks in enumerate(self._tasks):
            target = (rank, self.size, port, self._backend, tasks, self._results)
            self._processes.append(context.Process(target=_serve, args=target, daemon=True))
        for process in self._processes:
            process.start()
        for _ in self._processes:
            self._results.get(timeout=_STARTING)

    def stop(self):
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


def join(rank, size, port, patience=PATIENCE, backend="gloo"):
    """Make this process the one with number ``rank`` of a group."""
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(backend, address, timedelta(seconds=patience), world_size=size, rank=rank)


def _serve(rank, size, port, backend, tasks, results):
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    join(rank, size, port, backend=backend)
    results.put(rank)
    while True:
        function, arguments = tasks.get()
        text, value = None, None
        try:
            value = function(rank, *arguments)
        except BaseException:
            text = traceback.format_exc()
        with contextlib.suppress(Exception):
            results.put((rank, text, value))
