"""Tests attention over pages: the plain form and the kernel equal softmax over the tokens of each row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from betarank.model.decode import Table, attend_pages
from betarank.model.kernels import pages_tpu, pages_triton

ROWS, PROMPT_PAGES, OWN_PAGES = 6, 3, 4
PREFIX = np.array([40, 16, 40, 0, 16, 16], np.int32)  # rows 0 and 2 share a prompt, and rows 1, 4 and 5
LENGTH = np.array([5, 64, 1, 17, 30, 16], np.int32)


def inputs(heads, kv_heads, width, size, dtype=jnp.float32):
  """Returns (q_BNH, pages_P2KSH, table). Each row's pages are in random places. Pages without tokens hold huge numbers.

  heads: N. kv_heads: K. width: H. size: S, the number of tokens of a page. P is the number of pages, and 2 stands for
    key and value.
  """
  rng = np.random.default_rng(0)
  pages_BJ = rng.permutation(50)[: ROWS * 7].reshape(ROWS, 7).astype(np.int32)
  pages_BJ[2, :3], pages_BJ[4, :3], pages_BJ[5, :3] = pages_BJ[0, :3], pages_BJ[1, :3], pages_BJ[1, :3]
  table = Table(pages_BJ, PREFIX, np.array([[1, 4, 5], [0, 0, 0], [0, 2, 0], [3, 3, 3]], np.int32),
                np.array([3, 0, 2, 1], np.int32))
  pages_P2KSH = rng.normal(size=(50, 2, kv_heads, size, width))
  for b in range(ROWS):
    for first, filled in ((0, PREFIX[b]), (PROMPT_PAGES, LENGTH[b])):
      for j in range(-(-filled // size), PROMPT_PAGES if not first else OWN_PAGES):
        pages_P2KSH[pages_BJ[b, first + j]] = 1e4
  return jnp.asarray(rng.normal(size=(ROWS, heads, width)), dtype), jnp.asarray(pages_P2KSH, dtype), table


def naive(q_BNH, pages_P2KSH, table):
  q_BNH, pages_P2KSH = np.float64(q_BNH), np.float64(pages_P2KSH)
  out_BNH = np.zeros(q_BNH.shape)
  for b, pages_J in enumerate(table.pages_BJ):
    kv_2KJH = pages_P2KSH[pages_J].transpose(1, 2, 0, 3, 4)  # 2, K, J, S, H
    flat = lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1])
    kv_2KTH = np.concatenate([flat(kv_2KJH[:, :, :PROMPT_PAGES])[:, :, : PREFIX[b]],
                              flat(kv_2KJH[:, :, PROMPT_PAGES:])[:, :, : LENGTH[b]]], 2)
    q_KGH = q_BNH[b].reshape(kv_2KTH.shape[1], -1, q_BNH.shape[2])
    score_KGT = np.einsum('KGH,KTH->KGT', q_KGH, kv_2KTH[0]) * q_KGH.shape[-1] ** -0.5
    weight_KGT = np.exp(score_KGT - score_KGT.max(-1, keepdims=True))
    weight_KGT /= weight_KGT.sum(-1, keepdims=True)
    out_BNH[b] = np.einsum('KGT,KTH->KGH', weight_KGT, kv_2KTH[1]).reshape(out_BNH[b].shape)
  return out_BNH


@pytest.mark.parametrize('heads, kv_heads', [(8, 2), (4, 4), (6, 2)])
@pytest.mark.parametrize('attend', [attend_pages, pages_triton.attention, pages_tpu.attention])
def test_attention_over_pages_is_softmax_over_each_row_s_tokens(attend, heads, kv_heads, monkeypatch):
  q_BNH, pages_P2KSH, table = inputs(heads, kv_heads, 16, 16)
  run = jax.jit(attend, static_argnums=4)
  for programs in (1, 32) if attend is pages_triton.attention else (1,):  # the kernel with one part, and with more
    monkeypatch.setattr(pages_triton, 'PROGRAMS', programs)
    jax.clear_caches()
    got_BNH = run(q_BNH, pages_P2KSH, table, LENGTH, PROMPT_PAGES)
    np.testing.assert_allclose(got_BNH, naive(q_BNH, pages_P2KSH, table), atol=1e-5)


def test_attention_over_pages_in_bfloat16():
  q_BNH, pages_P2KSH, table = inputs(8, 2, 64, 16, jnp.bfloat16)
  want_BNH = naive(q_BNH, pages_P2KSH, table)
  for attend in (attend_pages, pages_triton.attention, pages_tpu.attention):
    got_BNH = np.float64(jax.jit(attend, static_argnums=4)(q_BNH, pages_P2KSH, table, LENGTH, PROMPT_PAGES))
    assert np.linalg.norm(got_BNH - want_BNH) < 1e-2 * np.linalg.norm(want_BNH)
