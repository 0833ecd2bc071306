"""The decoder: config (shapes), sharding (where arrays live), transformer (forward function), decode (its cache)."""

from betarank.model.config import ModelConfig, MoeConfig, flops_per_token, parameter_counts
from betarank.model.decode import Cache, empty_cache
from betarank.model.moe import Routing, update_router_bias
from betarank.model.sharding import RULES, MeshConfig, check_divides, make_mesh, platform, shardings, spec
from betarank.model.transformer import abstract, forward, forward_routed, head, init

__all__ = [
  'RULES',
  'Cache',
  'MeshConfig',
  'ModelConfig',
  'MoeConfig',
  'Routing',
  'abstract',
  'check_divides',
  'empty_cache',
  'flops_per_token',
  'forward',
  'forward_routed',
  'head',
  'init',
  'make_mesh',
  'parameter_counts',
  'platform',
  'shardings',
  'spec',
  'update_router_bias',
]
