"""Pallas kernels for operations that XLA compiles badly on a TPU or GPU.

Each computes the same as some XLA operations, and a test compares the two.
"""
