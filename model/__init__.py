"""The decoder: its config, its weights and forward function, the sharding table, and the cache for decoding.

Profiles and the planner (launch/plan/predict.py) identify the decoder's parts by their `jax.named_scope` names:

    embed               looks tokens up in the embedding table
    layers              the parts of the loop over layers that have no scope of their own, such as the last addition
    attention/norm      RMSNorm before attention
    attention/mask      masks and document boundaries, computed once for all layers
    attention/qkv       projections to queries, keys and values
    attention/rope      QK-norm and rotary positions
    attention/core      scores, softmax and weighted values, or the kernel that computes them; writes to the cache
    attention/out       output projection
    feed_forward/norm   adds attention's output to the residual stream; RMSNorm before the feed-forward network
    feed_forward/in     gate and up projections of a dense network or a shared expert, and their product
    feed_forward/out    down projection of a dense network or a shared expert
    moe/router          scores and choice of experts, weights of the chosen experts, load statistics
    moe/weights         all-gathers the experts' weights and reduces their gradients
    moe/dispatch        sends tokens to their experts and sorts them into tiles
    moe/experts         the experts' matrix products
    moe/combine         sums the experts' outputs for each token and sends the sums to the token's device
    final_norm          RMSNorm after the last layer
"""

from betarank.model.attention import GPU_ONLY_ATTENTION, check_kernel
from betarank.model.config import ModelConfig, MoeConfig, flops_per_token, parameter_counts
from betarank.model.decode import Cache, empty_cache
from betarank.model.moe import Routing, update_router_bias
from betarank.model.sharding import RULES, MeshConfig, check_divides, make_mesh, platform, shardings, spec
from betarank.model.transformer import abstract, forward, forward_routed, head, init

__all__ = [
  'GPU_ONLY_ATTENTION',
  'RULES',
  'Cache',
  'MeshConfig',
  'ModelConfig',
  'MoeConfig',
  'Routing',
  'abstract',
  'check_divides',
  'check_kernel',
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
