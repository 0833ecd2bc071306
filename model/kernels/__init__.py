"""Pallas kernels for attention within rows and over pages of a cache, experts, norms with rotations, SwiGLU and sums of
rows, on TPU and GPU. Tests compare each of them with XLA operations.
"""
