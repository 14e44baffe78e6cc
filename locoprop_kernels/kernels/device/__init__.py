"""Device code: Triton functions that kernels are made of."""
