"""Loads two checkpoints once, and builds from them what the page of `betarank explore` shows."""

import pytest

from betarank.eval.explore import views
from betarank.eval.loaded import Sampling, load_model
from betarank.tasks.verifiers import Verifier, VerifierConfig
from tests.eval.conftest import STEPS

TASK = 'reasoning:chain_sum?max_terms=2&max_digits=1'
FEW = Sampling(max_new_tokens=8)


@pytest.fixture(scope='session')
def models(run_dir):
  return [load_model(str(run_dir / 'checkpoints' / str(step))) for step in STEPS]


@pytest.fixture(scope='session')
def explorer(models):
  with Verifier(VerifierConfig(workers=1)) as verifier:
    yield views.Explorer(models, 10, views.open_sources(models[0]), views.open_tasks(models, TASK), verifier)


@pytest.fixture(scope='session')
def problem(explorer):
  """Returns the view of a problem with two answers by each checkpoint."""
  return explorer.problem(3, 2, FEW)
