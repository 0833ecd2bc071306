"""Provides what tests of evaluations need: a run with two checkpoints of random parameters, and its data."""

import json

import jax
import numpy as np
import pytest

from betarank import model
from betarank.configs import load
from betarank.runtime import checkpoint
from betarank.runtime.state import create_state
from betarank.train.config import run_config
from betarank.train.optimizer import make_optimizer
from tests.runs import prepare

STEPS = (4, 8)


@pytest.fixture(scope='session')
def make_params():
  """Returns a function (c, seed, scale=1) -> random parameters, about as large as those of model.init, which takes long
  to compile.
  """
  def make(c, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    _, shapes, axes = model.abstract(c)
    new = lambda shape, names: scale * (
      np.ones(shape.shape, np.float32) if 'norm' in names
      else rng.normal(0, c.d_model**-0.5, shape.shape).astype(np.float32))
    return jax.tree.map(new, shapes, axes)
  return make


@pytest.fixture(scope='session')
def run_dir(tmp_path_factory, make_params):
  root = tmp_path_factory.mktemp('eval')
  spec = f'tests/tiny.py:dir={root}/data'
  overrides = {'data.sources.main.uri': 'reasoning:chain_sum'}
  flags = [f'--config.{key}={value}' for key, value in overrides.items()]
  prepare(spec, *flags)
  config = load.load(spec, overrides)
  run = run_config(config)
  mesh = model.make_mesh(run.train.mesh, jax.devices()[:1])
  with jax.set_mesh(mesh):
    tx = make_optimizer(run.optimizer, run.steps, model.abstract(run.model)[2])
    checkpoints = checkpoint.Checkpoints(root / 'run', run.checkpoint)
    for step in STEPS:
      checkpoints.save(create_state(run.model, tx, mesh, 0, make_params(run.model, step)),
                       {'config': json.loads(load.to_json(config)), 'parent': '', 'cursor': {}, 'code_version': 'test'},
                       step)
    checkpoints.close()
  return root / 'run'
