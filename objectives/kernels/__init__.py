"""TPU kernels for what XLA does badly; each has its twin in XLA's operations, where a test compares them."""
