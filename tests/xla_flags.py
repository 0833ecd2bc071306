"""XLA flags with which programs compile faster."""

from importlib.metadata import version

# The emitter of fusions before the current one needs less than half of its time. Later XLA doesn't have it.
OLDER_EMITTER = ['--xla_cpu_use_fusion_emitters=false'] if version('jaxlib').startswith('0.10.') else []
# XLA's passes stay as they are, but LLVM doesn't optimize what they yield: that takes half of a compilation.
QUICK = ['--xla_backend_optimization_level=0', *OLDER_EMITTER]
# For programs that run often: LLVM optimizes a little, and RL's programs run as fast as users' do.
QUICK_AND_FAST = ['--xla_backend_optimization_level=1', *OLDER_EMITTER]
