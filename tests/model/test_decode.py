"""Tests attention over pages: the plain form and the kernel equal softmax over the tokens of each row."""

import functools

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


def tpu_attention(q_BNH, pages_P2KSH, table, length_B, prompt_pages):
  """Attention by the kernel that also writes: each row's last token is taken out of the pages, and given as the new."""
  last_B = length_B - 1
  page_B = table.pages_BJ[np.arange(ROWS), prompt_pages + last_B // pages_P2KSH.shape[3]]
  where = page_B, slice(None), slice(None), last_B % pages_P2KSH.shape[3]
  k_BKH, v_BKH = pages_P2KSH[where].swapaxes(0, 1)
  out_BNH, got_P2KSH = pages_tpu.step(
    pages_P2KSH.at[where].set(1e4), q_BNH, k_BKH, v_BKH, table, last_B, jnp.ones(ROWS, bool), prompt_pages)
  return jnp.where((got_P2KSH == pages_P2KSH).all(), out_BNH, jnp.nan)  # all else in the pages is as it was


@pytest.mark.parametrize('heads, kv_heads', [(8, 2), (4, 4), (6, 2)])
@pytest.mark.parametrize('attend', [attend_pages, pages_triton.attention, tpu_attention])
def test_attention_over_pages_is_softmax_over_each_row_s_tokens(attend, heads, kv_heads, monkeypatch):
  q_BNH, pages_P2KSH, table = inputs(heads, kv_heads, 16, 16)
  run = jax.jit(attend, static_argnums=4)
  monkeypatch.setattr(pages_tpu, 'BLOCK_BYTES', 1)  # one page at once; in bfloat16, below, all pages
  for programs in (1, 32) if attend is pages_triton.attention else (1,):  # the kernel with one part, and with more
    monkeypatch.setattr(pages_triton, 'PROGRAMS', programs)
    jax.clear_caches()
    got_BNH = run(q_BNH, pages_P2KSH, table, LENGTH, PROMPT_PAGES)
    np.testing.assert_allclose(got_BNH, naive(q_BNH, pages_P2KSH, table), atol=1e-5)


def test_attention_over_pages_in_bfloat16():
  q_BNH, pages_P2KSH, table = inputs(8, 2, 64, 16, jnp.bfloat16)
  want_BNH = naive(q_BNH, pages_P2KSH, table)
  for attend in (attend_pages, pages_triton.attention, tpu_attention):
    got_BNH = np.float64(jax.jit(attend, static_argnums=4)(q_BNH, pages_P2KSH, table, LENGTH, PROMPT_PAGES))
    assert np.linalg.norm(got_BNH - want_BNH) < 1e-2 * np.linalg.norm(want_BNH)


def test_the_kernel_that_writes_leaves_rows_without_a_token_alone(monkeypatch):
  """Also where two cores share the rows: the output is complete, and each row's page is written once."""
  q_BNH, pages_P2KSH, table = inputs(8, 2, 16, 16)
  real_B = jnp.array([False, True, False, False, True, True])
  new_BKH = jnp.ones((ROWS, 2, 16))
  outs = []
  for cores in (1, 2):
    monkeypatch.setattr(pages_tpu, 'cores', lambda cores=cores: cores)
    out_BNH, got_P2KSH = jax.jit(functools.partial(pages_tpu.step, prompt_pages=PROMPT_PAGES))(
      pages_P2KSH, q_BNH, new_BKH, new_BKH, table, LENGTH - 1, real_B)
    outs.append(out_BNH)
  np.testing.assert_array_equal(*outs)
  assert not out_BNH[~real_B].any() and out_BNH[real_B].any(-1).all()
  page_B = table.pages_BJ[np.arange(ROWS), PROMPT_PAGES + (LENGTH - 1) // 16]
  want_P2KSH = pages_P2KSH.at[page_B[real_B], :, :, (LENGTH - 1)[real_B] % 16].set(1)
  np.testing.assert_array_equal(got_P2KSH, want_P2KSH)


@pytest.mark.parametrize('rows, heads, kv_heads, columns, right', [
  (64, 4, 1, 272, True),  # 4B on v5e-256: 8 chips share the weights; rows of 17,408 tokens in pages of 64
  (128, 4, 1, 272, True),  # 4B on 128 chips
  (16, 32, 4, 272, True),  # the mixtures of experts on 128 chips
  (2048, 4, 1, 272, False),  # the table is larger than the memory for scalars
  (1920, 16, 4, 34, True), (1920, 32, 8, 34, False),  # queries and outputs
])
def test_the_kernel_for_tpus_is_used_only_if_all_rows_fit_on_a_chip(rows, heads, kv_heads, columns, right):
  shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  table = Table(jax.ShapeDtypeStruct((rows, columns), jnp.int32), None, None, None)
  assert pages_tpu.fits(shape(rows, heads, 128), shape(1000, 2, kv_heads, 64, 128), table) == right
