"""Kernels for what XLA does badly on a TPU or a GPU; each has its twin in XLA operations, and a test compares them."""
