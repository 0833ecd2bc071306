"""The decoder: config (shapes), sharding (where arrays live), transformer (forward function), decode (its cache)."""

from model.config import ModelConfig, flops_per_token, parameter_counts
from model.decode import Cache, empty_cache
from model.sharding import RULES, MeshConfig, check_divides, make_mesh, platform, shardings, spec
from model.transformer import abstract, forward, head, init

__all__ = [
  'RULES',
  'Cache',
  'MeshConfig',
  'ModelConfig',
  'abstract',
  'check_divides',
  'empty_cache',
  'flops_per_token',
  'forward',
  'head',
  'init',
  'make_mesh',
  'parameter_counts',
  'platform',
  'shardings',
  'spec',
]
