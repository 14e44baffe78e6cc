"""One command for a machine with a GPU: ``make gpu``, ``python -m bench.gpu``; see :mod:`bench.gpu.command`."""
