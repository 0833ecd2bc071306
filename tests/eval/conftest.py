"""Provides what tests of evaluations need: a run with two checkpoints of random parameters, and its data."""

import json

import jax
import pytest

from betarank import model
from betarank.configs import load
from betarank.runtime import checkpoint
from betarank.runtime.state import create_state
from betarank.train.config import run_config
from betarank.train.optimizer import make_optimizer
from tests import parameters
from tests.runs import prepare

STEPS = (4, 8)


@pytest.fixture(scope='session')
def run_dir(tmp_path_factory):
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
      checkpoints.save(create_state(run.model, tx, mesh, 0, parameters.random(run.model, step)),
                       {'config': json.loads(load.to_json(config)), 'parent': '', 'cursor': {}, 'code_version': 'test'},
                       step)
    checkpoints.close()
  return root / 'run'
