"""Pallas kernels for operations that XLA compiles badly on a TPU or GPU.

Each kernel computes the same as some XLA operations, and a test compares it with these operations.
"""
