"""Triton kernels. This package is the only one that imports Triton."""
