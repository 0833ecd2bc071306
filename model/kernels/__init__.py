"""Pallas kernels for attention, experts, SwiGLU and sums of rows, on TPU and GPU. Tests compare each of them with XLA
operations.
"""
