"""Pallas kernels for operations that XLA compiles badly on a TPU or GPU.

Each has an equivalent in XLA operations, and a test compares the two.
"""
