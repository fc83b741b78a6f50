"""Accelerator kernels, one per file, each beside the plain-JAX twin that the tests compare it with."""
