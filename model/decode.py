"""The cache of keys and values, with which the model's forward function decodes token by token.

The cache consists of pages. A page holds the keys and values of S tokens. Each row has a list of pages: first the pages
of its prompt, which rows with the same prompt share, then its own pages, which no other row uses. Rows can have
different numbers of pages, and attention reads only pages that hold tokens.

The rows of a prompt are divided into units of up to M rows, so that a kernel reads the prompt's pages once per unit.

# L layers  B rows  T new tokens  J pages of a row, the first I of them for its prompt  P pages  S tokens of a page
# 2 keys, values  K key heads  G query heads per key head  N = K·G query heads  H head width  U units of up to M rows
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from betarank.model.attention import rows_attention
from betarank.model.config import ModelConfig
from betarank.model.kernels import pages_tpu, pages_triton
from betarank.model.sharding import constrain, per_device, platform, spec

UNSEEN = -1e30
UNITS = 4  # whose prompts the plain form reads at once
PAGES_AXES = ('batch', None, 'act_heads', None, None)


class Table(NamedTuple):
  """The pages that hold each row's keys and values.

  If a mesh splits the batch, each part of the batch has its own rows and pages, both numbered from 0.

  Attributes:
    pages_BJ: int32, the page numbers of each row. The first `Cache.prompt_pages` columns are the pages of the row's
      prompt. The remaining columns are the row's own pages, which no other row uses.
    prefix_B: int32, the number of tokens in the row's prompt pages.
    rows_UM: int32, the rows of each unit. All rows of a unit have the same prompt pages, so a kernel reads these pages
      once per unit. A unit of fewer than M rows is filled up with copies of its first row.
    count_U: int32, the number of rows in each unit, without the copies. Every row that decodes is in exactly one unit.
  """

  pages_BJ: jax.Array | np.ndarray
  prefix_B: jax.Array | np.ndarray
  rows_UM: jax.Array | np.ndarray
  count_U: jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """The keys and values of the tokens that the model has already processed.

  Each layer has an array of its own, so that a loop of decoding steps can write in place.

  Attributes:
    pages_LP2KSH: one array [P, 2, K, S, H] per layer, in the compute dtype.
    table: the pages of each row.
    length_B: int32, the number of tokens in each row's own pages. The prompt's pages, which several rows can share,
      aren't counted.
    prompt_pages: the number of prompt pages in each row of the table; the dimension I in names of arrays.
  """

  pages_LP2KSH: tuple[jax.Array, ...]
  table: Table
  length_B: jax.Array
  prompt_pages: int = dataclasses.field(metadata={'static': True})


def empty_pages(c: ModelConfig, pages: int, size: int) -> tuple[jax.Array, ...]:
  """Returns one array [pages, 2, K, size, H] of zeros per layer, in the compute dtype. 2 stands for keys and values.

  pages, size: the number of pages, and the number of tokens per page.
  """
  # Never one array in two places: a cache that is donated gives each buffer once.
  shape = pages, 2, c.kv_heads, size, c.head_dim
  return tuple(constrain(jnp.zeros(shape, c.dtype), *PAGES_AXES) for _ in range(c.layers))


def empty_cache(c: ModelConfig, rows: int, prompt: int, new: int, size: int = 64) -> Cache:
  """Returns an empty cache in which no pages are shared. Each row has room for `prompt` prompt tokens and `new` other
  tokens.

  size: the number of tokens of a page.
  """
  prompt_pages, all_pages = -(-prompt // size), -(-prompt // size) - (-new // size)
  pages_BJ = jnp.arange(rows * all_pages, dtype=jnp.int32).reshape(rows, -1)
  zeros_B = jnp.zeros(rows, jnp.int32)
  rows_UM = jnp.arange(rows, dtype=jnp.int32)[:, None]
  return Cache(empty_pages(c, rows * all_pages, size), Table(pages_BJ, zeros_B, rows_UM, zeros_B + 1), zeros_B,
               prompt_pages)


def unit_rows(c: ModelConfig) -> int:
  """Returns M, the largest number of rows of a unit (see `Table`). It is 16 / G rounded down, but at least 1.

  For each key head, a row has G queries. The GPU kernel multiplies keys by at least 16 queries at a time, so up to 16 /
  G rows take no longer than one row. A larger unit would need several products, and save no time.
  """
  return max(1, 16 * c.kv_heads // c.heads)


def attend_layers(cache: Cache, segments_BT: jax.Array, c: ModelConfig):
  """Returns (attend, cache) for a forward pass over T new tokens per row.

  attend(pages_P2KSH, q_BTNH, k_BTKH, v_BTKH) -> (out_BTNH, pages_P2KSH) computes one layer's attention, and writes the
  new keys and values into the layer's pages. The returned cache still has the old pages, but its lengths include the
  new tokens.

  If T = 1, the token is the next token of its row. If T > 1, the rows must be empty, and the T tokens are their
  prompts. T can then be any number, so the kernel is chosen by T, and not by c.attention.

  segments_BT: int32, 0 for padding. Padding must follow the tokens of a row, and isn't counted in the lengths.
  """
  real_BT = segments_BT > 0
  count_B = jnp.sum(real_BT, 1, dtype=jnp.int32)
  table, heads, rows, by_token = cache.table, ('batch', 'act_heads', None), ('batch',), ('batch', None)
  if segments_BT.shape[1] > 1:
    attend_rows = rows_attention('auto', segments_BT, c.dtype, c.kv_heads, c.head_dim)
    keys = ('batch', None, 'act_heads', None)
    fill = _on_shards(_fill, (PAGES_AXES, keys, keys, by_token), PAGES_AXES)
    pages_BI = table.pages_BJ[:, : cache.prompt_pages]
    attend = lambda pages, q, k, v: (attend_rows(q, k, v), fill(pages, k, v, pages_BI))
    return attend, dataclasses.replace(cache, table=table._replace(prefix_B=count_B))
  step = _on_shards(
    functools.partial(_step, cache.prompt_pages),
    (PAGES_AXES, heads, heads, heads, rows, rows, by_token, rows, by_token, rows), (heads, PAGES_AXES))

  def attend(pages_P2KSH, q_B1NH, k_B1KH, v_B1KH):
    out_BNH, pages_P2KSH = step(
      pages_P2KSH, q_B1NH[:, 0], k_B1KH[:, 0], v_B1KH[:, 0], cache.length_B, real_BT[:, 0], *table)
    return out_BNH[:, None], pages_P2KSH

  return attend, dataclasses.replace(cache, length_B=cache.length_B + count_B)


def _fill(pages_P2KSH, k_BTKH, v_BTKH, pages_BI):
  """Returns the pages with the keys and values of prompts written into them. Page numbers out of range are ignored.

  pages_BI: int32, the prompt pages of each row.
  """
  size, needed = pages_P2KSH.shape[3], pages_BI.shape[1]
  new_2BTKH = jnp.stack([k_BTKH, v_BTKH])
  new_2BTKH = jnp.pad(new_2BTKH, ((0, 0), (0, 0), (0, -new_2BTKH.shape[2] % size), (0, 0), (0, 0)))
  new_2BISKH = new_2BTKH.reshape(*new_2BTKH.shape[:2], -1, size, *new_2BTKH.shape[3:])[:, :, :needed]
  written_BI = pages_BI[:, : new_2BISKH.shape[2]]
  return pages_P2KSH.at[written_BI].set(new_2BISKH.transpose(1, 2, 0, 4, 3, 5), mode='drop')


def _step(prompt_pages, pages_P2KSH, q_BNH, k_BKH, v_BKH, length_B, real_B, *table):
  """Writes the keys and values of one token per row, and computes this token's attention.

  Returns (out_BNH, pages_P2KSH).

  prompt_pages: how many of each row's pages in the table hold its prompt. Rows with the same prompt share them; the
    other pages are the row's own.
  length_B: the number of tokens in each row's own pages, without the new token.
  real_B: bool, False for padding, whose keys and values aren't written.
  table: the fields of a Table.
  """
  table, (size, width), on = Table(*table), pages_P2KSH.shape[3:], platform()
  if on == 'tpu' and pages_tpu.fits(q_BNH, pages_P2KSH, table):
    return pages_tpu.step(pages_P2KSH, q_BNH, k_BKH, v_BKH, table, length_B, real_B, prompt_pages)
  page_B = jnp.take_along_axis(table.pages_BJ, (prompt_pages + length_B // size)[:, None], 1, mode='clip')[:, 0]
  page_B = jnp.where(real_B, page_B, len(pages_P2KSH))  # out of range: not written
  pages_P2KSH = pages_P2KSH.at[page_B, :, :, length_B % size].set(jnp.stack([k_BKH, v_BKH], 1), mode='drop')
  attention = pages_triton.attention if on == 'gpu' and pages_triton.fits(size, width) else attend_pages
  return attention(q_BNH, pages_P2KSH, table, length_B + real_B, prompt_pages), pages_P2KSH


def _on_shards(function, inputs, outputs):
  """Returns `function` wrapped so that each device runs it on its own rows, pages and heads.

  Without this, XLA would all-gather the pages of all devices.

  inputs, outputs: the logical axis names (model/sharding.py) of the arguments and of the results.
  """
  specs = lambda axes: spec(*axes) if not isinstance(axes[0], tuple) else tuple(spec(*each) for each in axes)
  return per_device(function, specs(inputs), specs(outputs))


def attend_pages(q_BNH, pages_P2KSH, table: Table, length_B, prompt_pages: int) -> jax.Array:
  """Computes attention of one token per row over the row's pages, [B, N, H]. Scores and softmax are float32.

  The function first computes attention over the prompts, a few units (see `Table`) at a time. It then computes
  attention over each row's own pages, and combines both results. The kernels of model/kernels compute the same. This
  function needs only XLA operations.

  length_B: int32, the number of tokens in each row's own pages.
  prompt_pages: I, the number of prompt pages in each row of the table.
  """
  (rows, heads, width), kv_heads = q_BNH.shape, pages_P2KSH.shape[2]
  q_BKGH = (q_BNH * width**-0.5).reshape(rows, kv_heads, -1, width)
  (units, members), group = table.rows_UM.shape, heads // kv_heads
  some = min(UNITS, units)

  def of_units(i, found):
    rows_CM = lax.dynamic_slice_in_dim(table.rows_UM, i * some, some)
    q_CKQH = q_BKGH[rows_CM].swapaxes(1, 2).reshape(some, kv_heads, members * group, width)
    first_C = rows_CM[:, 0]
    new = _over_columns(q_CKQH, pages_P2KSH, table.pages_BJ[first_C], table.prefix_B[first_C])
    by_row = lambda x: x.reshape(some, kv_heads, members, group, *x.shape[3:]).swapaxes(1, 2)
    # A row that is in several places of these units has the same results in all.
    return tuple(old.at[rows_CM].set(by_row(x)) for old, x in zip(found, new))

  shape = rows, kv_heads, group
  nothing = jnp.zeros((*shape, width), jnp.float32), jnp.full(shape, UNSEEN), jnp.zeros(shape)
  passes = (jnp.sum(table.count_U > 0) + some - 1) // some
  prompt = lax.fori_loop(0, passes, of_units, nothing)
  own = _over_columns(q_BKGH, pages_P2KSH, table.pages_BJ[:, prompt_pages:], length_B)
  most_BKG = jnp.maximum(prompt[1], own[1])
  out_BKGH, sum_BKG = 0, 1e-30
  for part_BKGH, part_most_BKG, part_sum_BKG in (prompt, own):
    fade_BKG = jnp.exp(part_most_BKG - most_BKG)
    out_BKGH += part_BKGH * fade_BKG[..., None]
    sum_BKG += part_sum_BKG * fade_BKG
  return (out_BKGH / sum_BKG[..., None]).astype(q_BNH.dtype).reshape(q_BNH.shape)


def _over_columns(q_BKGH, pages_P2KSH, pages_BJ, filled_B):
  """Computes attention over the first filled_B tokens in each row's pages, without dividing by the softmax's sum.

  Returns (out_BKGH, most_BKG, sum_BKG), float32: the sum of exp(score - most)·value, the largest score, and the sum of
  exp(score - most). The pages are read one column of pages_BJ at a time.

  q_BKGH: the queries, already divided by √H.
  pages_BJ: int32, the page numbers of each row.
  """
  size = pages_P2KSH.shape[3]

  def step(j, carry):
    out_BKGH, most_BKG, sum_BKG = carry
    page_B = lax.dynamic_index_in_dim(pages_BJ, j, 1, keepdims=False)
    k_BKSH, v_BKSH = (pages_P2KSH.at[page_B, i].get(mode='promise_in_bounds') for i in (0, 1))
    # On a CPU, XLA has fast products for this order, and slow ones for weights with G last.
    score_BKSG = jnp.einsum('BKSH,BKGH->BKSG', k_BKSH, q_BKGH, preferred_element_type=jnp.float32)
    seen_B11S = j * size + jnp.arange(size)[None, None, None] < filled_B[:, None, None, None]
    score_BKGS = jnp.where(seen_B11S, score_BKSG.swapaxes(2, 3), UNSEEN)
    new_BKG = jnp.maximum(most_BKG, score_BKGS.max(3))
    weight_BKGS = jnp.where(seen_B11S, jnp.exp(score_BKGS - new_BKG[..., None]), 0)
    fade_BKG = jnp.exp(most_BKG - new_BKG)
    out_BKGH = out_BKGH * fade_BKG[..., None] + jnp.einsum(
      'BKGS,BKSH->BKGH', weight_BKGS.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
    return out_BKGH, new_BKG, sum_BKG * fade_BKG + weight_BKGS.sum(3)

  shape = q_BKGH.shape[:3]
  carry = jnp.zeros(q_BKGH.shape, jnp.float32), jnp.full(shape, UNSEEN), jnp.zeros(shape)
  return lax.fori_loop(0, (jnp.max(filled_B) + size - 1) // size, step, carry)
