"""Lowers the programs of a config for devices that this machine doesn't have. Allocates no arrays and reads no data."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from betarank import model
from betarank.configs.errors import ConfigError
from betarank.data import Batch, sources
from betarank.launch.plan.chips import PlanError
from betarank.launch.plan.workload import Workload
from betarank.rl.packing import Microbatch
from betarank.rl.update import make_update
from betarank.runtime.state import TrainState, abstract_state
from betarank.train import setup
from betarank.train.optimizer import make_optimizer
from betarank.train.sampler import Sampler, SamplerConfig
from betarank.train.step import make_step

Lower = Callable[[], jax.stages.Lowered]
EOS = 0  # any id will do, because it is a constant that changes neither memory nor time of the decode program


def make_mesh(work: Workload, devices: Sequence[Any]) -> Mesh:
  """Returns the mesh that the run would create over `devices`.

  Raises:
    PlanError: the mesh or the batch doesn't fit these devices. The message names a mesh or batch that fits.
    ConfigError: the mesh or the attention doesn't suit the length of rows.
  """
  run, count = work.run, len(devices)
  try:
    mesh = setup.make_mesh(run.mesh, run.model, {}, devices)
  except ConfigError as error:
    slices = len({getattr(device, 'slice_index', 0) for device in devices})
    example = f' --config.train.mesh.data={slices} --config.train.mesh.fsdp=-1' if slices > 1 else ''
    raise PlanError(
      f'{error}; the axes must make up the {count} chips of this topology, one at -1 takes the rest{example}, and '
      f'fsdp={math.gcd(run.model.d_model, count)} with data=-1 divides the width of {run.model.d_model}') from None
  for key, (rows, microbatches) in run.split_rows.items():
    try:
      setup.check_rows(key, rows, mesh.shape, microbatches)
    except ConfigError as error:
      step = microbatches * math.prod(mesh.shape[axis] for axis in model.RULES['batch'])
      near = sorted({max(step, rows // step * step), -(-rows // step) * step})
      raise PlanError(f'{error}; {" or ".join(map(str, near))} would do') from None
  key = 'rl.max_prompt_tokens + max_new_tokens' if work.rl else 'data.sequence_length'
  setup.check_length(key, work.microbatch(mesh.shape)[1], run.model, mesh)
  return mesh


def lowerings(work: Workload, mesh: Mesh) -> tuple[TrainState, dict[str, tuple[Mesh, Lower]]]:
  """Returns the abstract train state, and {name of a program: (its mesh, a function that lowers it)}.

  Pre-training has one program, `train`. RL has four: `gradient` (for the largest microbatch), `optimizer`, `weights`
  and `decode`. `weights` copies the parameters to the sampler's mesh, once per step. In RL, shapes are those of the
  phase with the longest answers. Some smaller programs of RL aren't planned: the prefill of prompts, the smaller
  microbatches, and the computation of log-probabilities under the old and the reference policy.
  """
  tx = make_optimizer(work.run.optimizer, work.run.updates, model.abstract(work.run.model)[2])
  state = abstract_state(work.run.model, tx, mesh)
  if work.rl:
    update = make_update(work.run.model, work.rl.loss, tx, work.rl.temperature)
    gradients = state.params, _abstract(mesh, (), jnp.int32)
    try:
      sampler = Sampler(work.run.model, sampler_config(work), EOS, mesh)
    except ValueError as error:
      raise PlanError(f'config.rl.{error}') from None
    lower = {
      'gradient': (mesh, lambda: update.gradient.lower(state.params, gradients, *_microbatch(work, mesh))),
      'optimizer': (mesh, lambda: update.apply.lower(state, gradients)),
      'weights': (mesh, lambda: sampler.lower_weights(state.params)),
      'decode': (sampler.mesh, lambda: sampler.lower_decode(state.params))}
  else:
    lower = {'train': (mesh, lambda: _lower_train(work, mesh, tx, state))}
  return state, {name: (on, _with_mesh(on, function)) for name, (on, function) in lower.items()}


def sampler_config(work: Workload) -> SamplerConfig:
  """Returns the settings of the sampler that rl/loop.py uses in the phase with the longest answers."""
  rl = work.rl
  return SamplerConfig(rl.decode_batch_size, rl.max_prompt_tokens, max(rl.max_new_tokens), record_choices=True,
                       cache_tokens=rl.cache_tokens, decode_split=rl.decode_split)


def _lower_train(work: Workload, mesh: Mesh, tx, state: TrainState) -> jax.stages.Lowered:
  run = work.run
  tokens = lambda dtype: _abstract(mesh, (work.rows, work.length), dtype, 'batch', 'length')
  masked = any(sources.masked(source) for source in run.data.sources.values())
  batch = Batch(*[tokens(jnp.int32)] * 4, tokens(jnp.bool_) if masked else None)
  stats, byte_counts = 'full' if run.log.head_tail_mass else 'basic', np.ones(run.model.vocab_size, np.int32)
  return make_step(run.model, run.objective, tx, byte_counts, run.microbatches, stats).lower(state, batch)


def _microbatch(work: Workload, mesh: Mesh) -> tuple[Any, ...]:
  """Returns the arguments of RL's gradient program that depend on data, as jax.ShapeDtypeStructs.

  They are a microbatch, then arrays [rows, tokens per row]: the log-probabilities under the policy before the update,
  those under the reference policy, and a mask of the tokens that the loss selects by covariance (rl.loss.cov). An array
  that the config doesn't need is None.
  """
  c, rl, shape = work.run.model, work.rl, work.microbatch(mesh.shape)
  tokens = lambda dtype, *more: _abstract(mesh, (*shape, *more), dtype, 'batch', 'length')
  choices_BTLk = tokens(jnp.int16, c.layers, c.moe.experts_per_token) if c.moe.experts else None
  batch = Batch(*[tokens(jnp.int32)] * 4, tokens(jnp.bool_))
  return (
    Microbatch(batch, tokens(jnp.float32), tokens(jnp.float32), tokens(jnp.int32), choices_BTLk),
    tokens(jnp.float32) if rl.minibatches > 1 else None,
    tokens(jnp.float32) if rl.loss.kl_weight else None,
    tokens(jnp.bool_) if rl.loss.cov else None,
  )


def _abstract(mesh: Mesh, shape: tuple[int, ...], dtype, *axes: str) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, model.spec(*axes)))


def _with_mesh(mesh: Mesh, lower: Lower) -> Lower:
  """Returns a function that calls `lower` with the abstract mesh of `mesh` as the current mesh.

  With `mesh` itself, JAX would place constants on its devices, which this machine doesn't have.
  """
  def run():
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return lower()
  return run
