"""The XLA flags with which tests compile."""

from importlib.metadata import version


def xla_flags(optimized: bool) -> list[str]:
  """Returns flags for eight CPU devices, and for quick compilation unless programs are `optimized` as for users."""
  flags = ['--xla_force_host_platform_device_count=8']
  if not optimized:
    # XLA's passes stay as they are, but LLVM doesn't optimize what they yield: that takes half of a compilation.
    flags.append('--xla_backend_optimization_level=0')
    # The emitter of fusions before the current one needs less than half of its time. Later XLA doesn't have it.
    if version('jaxlib').startswith('0.10.'):
      flags.append('--xla_cpu_use_fusion_emitters=false')
  return flags
