"""Tests that the page shows the model's predictions for each token."""

import jax.numpy as jnp
import numpy as np
import pytest

from betarank import model
from betarank.eval.explore.figures import SHOWN, figures

TEXTS = [[5, 6, 7, 300, 12, 9, 40], [17, 23], []]
K = 10


@pytest.fixture(scope='module')
def found(models):
  return figures(models[0], TEXTS, K)


def expected(loaded, text):
  """Returns log p, float64 [N + 1, V], computed from all logits at once."""
  c, tokens = loaded.run.model, jnp.array([[loaded.tokenizer.bos, *text]])
  hidden = model.forward(c, loaded.params, tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))[0]
  z = np.asarray(hidden[0], np.float64) @ np.asarray(model.head(c, loaded.params), np.float64)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_figures_are_those_of_the_whole_distribution(models, found):
  logp = expected(models[0], TEXTS[0])
  f, N = found[0], len(TEXTS[0])
  p, at = np.exp(logp), (np.arange(N), TEXTS[0])
  np.testing.assert_allclose(f.logp, logp[at], atol=1e-5)
  np.testing.assert_allclose(f.entropy, -(p * logp).sum(-1), atol=1e-5)
  np.testing.assert_array_equal(f.rank, (logp[:N] > logp[at][:, None]).sum(-1))
  order = np.argsort(-logp, -1)
  np.testing.assert_array_equal(f.top, order[:, :SHOWN])
  np.testing.assert_allclose(f.top_logp, np.take_along_axis(logp, order, -1)[:, :SHOWN], atol=1e-5)
  wrong_head = np.array([sum(p[i, t] for t in order[i, :K] if t != TEXTS[0][i]) for i in range(N)])
  np.testing.assert_allclose(f.head, wrong_head, atol=1e-5)
  np.testing.assert_allclose(f.head + f.tail + np.exp(f.logp), 1, atol=1e-5)


def test_a_text_has_the_same_figures_whatever_is_beside_it(models, found):
  for text, among in zip(TEXTS, found):
    assert [len(x) for x in among] == [len(text), len(text), len(text) + 1, len(text), len(text), *[len(text) + 1] * 2]
  [_, elsewhere, _] = figures(models[0], [[8] * 14, TEXTS[1], TEXTS[1][:1]], K)
  for one, other in zip(elsewhere, found[1]):
    np.testing.assert_allclose(one, other, atol=1e-5)
