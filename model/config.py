"""Defines the config sections `model` and `model.moe`, and counts a model's parameters and FLOPs."""

import dataclasses

import jax.numpy as jnp

from betarank.configs.settings import default
from betarank.model.attention import KERNELS
from betarank.model.sharding import platform

# Remat policies, from the most memory to the least. Each lists the intermediates that are saved for the backward pass,
# by the names that layers give them with jax.ad_checkpoint.checkpoint_name. All others are recomputed. The policy
# `none` recomputes nothing.
REMAT = {
  'none': None,
  'matmuls': ('qkv', 'attention', 'mlp'),
  'qkv': ('qkv', 'attention'),
  'attention': ('attention',),
  'full': (),
}
DTYPES = ('auto', 'float32', 'bfloat16')
ROUTERS = ('sigmoid', 'softmax')
EXPERT_KERNELS = ('auto', 'tiles', 'ragged', 'pallas', 'triton')


@dataclasses.dataclass(frozen=True)
class MoeConfig:
  """Section `model.moe`: a mixture of experts in place of the dense feed-forward network (model/moe.py).

  Attributes:
    experts: the number of experts; 0 for a dense model.
    experts_per_token: the number of experts that each token is sent to.
    expert_d_ff: the hidden size of an expert.
    shared_d_ff: the hidden size of the expert that all tokens use; 0 for none.
    router: 'sigmoid' or 'softmax', see `moe.MixtureOfExperts`.
    norm_topk_prob: whether the scores of a token's chosen experts are divided by their sum.
    routed_scale: a factor by which the sum of the chosen experts' outputs is multiplied.
    bias_update_rate: the amount by which each update raises or lowers a router bias ('sigmoid' only).
    balance_weight: the weight of the load-balance loss ('softmax' only).
    kernel: one of EXPERT_KERNELS; 'auto' chooses by platform and sizes.

  Raises:
    ValueError: a value is out of range. The message begins with the field's name.
  """

  experts: int = default('model.moe.experts')
  experts_per_token: int = default('model.moe.experts_per_token')
  expert_d_ff: int = default('model.moe.expert_d_ff')
  shared_d_ff: int = default('model.moe.shared_d_ff')
  router: str = default('model.moe.router')
  norm_topk_prob: bool = default('model.moe.norm_topk_prob')
  routed_scale: float = default('model.moe.routed_scale')
  bias_update_rate: float = default('model.moe.bias_update_rate')
  balance_weight: float = default('model.moe.balance_weight')
  kernel: str = default('model.moe.kernel')

  def __post_init__(self):
    for name in ('experts', 'shared_d_ff', 'bias_update_rate', 'balance_weight'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name} must be >= 0, got {getattr(self, name)}')
    for name, known in (('router', ROUTERS), ('kernel', EXPERT_KERNELS)):
      if getattr(self, name) not in known:
        raise ValueError(f'{name} must be one of {", ".join(known)}, got {getattr(self, name)!r}')
    if not self.experts:
      for name in ('shared_d_ff', 'balance_weight'):
        if getattr(self, name):
          raise ValueError(f'{name} must be 0 without experts, got {getattr(self, name)}')
      return
    if not 1 <= self.experts_per_token <= self.experts:
      raise ValueError(f'experts_per_token must be from 1 to experts = {self.experts}, got {self.experts_per_token}')
    for name in ('expert_d_ff', 'routed_scale'):
      if getattr(self, name) <= 0:
        raise ValueError(f'{name} must be > 0, got {getattr(self, name)}')
    if self.balance_weight and self.router != 'softmax':
      raise ValueError(f'balance_weight must be 0 for router {self.router!r}, which a bias balances, '
                       f'got {self.balance_weight}')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Section `model`: a decoder with the blocks of Qwen3 (dense or mixture of experts), Qwen2 or Llama 3.

  configs/settings.py describes each field.

  Raises:
    ValueError: sizes don't fit together, or a value is out of range. The message begins with the field's name.
  """

  vocab_size: int
  layers: int
  d_model: int
  d_ff: int
  heads: int
  kv_heads: int
  head_dim: int
  rope_base: float
  norm_eps: float
  tied_embeddings: bool
  compute_dtype: str
  remat_policy: str
  scan_layers: bool
  attention: str = default('model.attention')
  qk_norm: bool = default('model.qk_norm')
  qkv_bias: bool = default('model.qkv_bias')
  rope_factor: float = default('model.rope_factor')
  offload_activations: bool = default('model.offload_activations')
  moe: MoeConfig = MoeConfig()

  def __post_init__(self):
    for name in ('vocab_size', 'layers', 'd_model', 'd_ff', 'heads', 'kv_heads', 'head_dim', 'rope_base', 'norm_eps'):
      if getattr(self, name) <= 0:
        raise ValueError(f'{name} must be > 0, got {getattr(self, name)}')
    if self.rope_factor < 1:
      raise ValueError(f'rope_factor must be >= 1, got {self.rope_factor}')
    if self.heads % self.kv_heads:
      raise ValueError(f'kv_heads must divide heads = {self.heads}, got {self.kv_heads}')
    if self.head_dim % 2:
      raise ValueError(f'head_dim must be even (rotary pairs), got {self.head_dim}')
    if self.remat_policy not in REMAT:
      raise ValueError(f'remat_policy must be one of {", ".join(REMAT)}, got {self.remat_policy!r}')
    if self.offload_activations and not REMAT[self.remat_policy]:
      raise ValueError('offload_activations needs a remat_policy that saves something to move, got '
                       f'{self.remat_policy!r}')
    if self.attention not in KERNELS:
      raise ValueError(f'attention must be one of {", ".join(KERNELS)}, got {self.attention!r}')
    if self.compute_dtype not in DTYPES:
      raise ValueError(f'compute_dtype must be one of {", ".join(DTYPES)}, got {self.compute_dtype!r}')

  @property
  def dtype(self) -> jnp.dtype:
    """The dtype of activations and of matmul inputs. 'auto' is float32 if the current mesh is on CPU, else bfloat16."""
    if self.compute_dtype == 'auto':
      return jnp.dtype(jnp.float32 if platform() == 'cpu' else jnp.bfloat16)
    return jnp.dtype(self.compute_dtype)


def parameter_counts(c: ModelConfig, active: bool = False) -> dict[str, int]:
  """Returns the number of parameters of each part. Their sum is the number of parameters that `model.init` creates.

  active: whether to count only the parameters that one token uses. Of each layer's experts, a token uses
  experts_per_token.
  """
  attention = c.d_model * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
  norms = 2 * c.d_model + 2 * c.head_dim * c.qk_norm
  moe = c.moe
  experts = min(moe.experts_per_token, moe.experts) if active else moe.experts
  return {
    'embedding': c.vocab_size * c.d_model,
    'attention': c.layers * attention,
    'feed_forward': c.layers * 3 * c.d_model * (moe.shared_d_ff if moe.experts else c.d_ff),
    'experts': c.layers * experts * 3 * c.d_model * moe.expert_d_ff,
    'router': c.layers * moe.experts * (c.d_model + (moe.router == 'sigmoid')),
    'norms': c.layers * norms + c.d_model,
    'biases': c.layers * c.head_dim * (c.heads + 2 * c.kv_heads) * c.qkv_bias,
    'head': 0 if c.tied_embeddings else c.vocab_size * c.d_model,
  }


def flops_per_token(c: ModelConfig, sequence_length: int) -> float:
  """Returns the FLOPs per trained token, forward and backward together. Recomputation isn't counted.

  Each weight that a matmul uses takes 6 FLOPs. In causal attention over T tokens, a query sees T/2 keys on average.
  Scores and weighted values of one query take 4·(T/2)·heads·head_dim FLOPs per layer in the forward pass, and three
  times as many in both passes.
  """
  counts = parameter_counts(c, active=True)
  weights = sum(counts[part] for part in ('attention', 'feed_forward', 'experts', 'router'))
  weights += c.vocab_size * c.d_model  # the head is a matmul even if its weights are tied
  return 6.0 * weights + 6.0 * c.layers * sequence_length * c.heads * c.head_dim
