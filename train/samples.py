"""A few texts from the model as it is, to look at while it trains. Not the RL sampler.

# B texts  P prompt tokens  T new tokens  V vocabulary
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from betarank import model
from betarank.data import Tokenizer


@functools.partial(jax.jit, static_argnums=(0, 4))
def _continue(c: model.ModelConfig, params: Any, prompt_BP: jax.Array, key: jax.Array, new_tokens: int) -> jax.Array:
  """[B, T] int32 tokens drawn one by one at temperature 1; prompts are all P long."""
  rows, length = prompt_BP.shape

  def feed(tokens_BT, positions_BT, cache):
    hidden_BTD, cache = model.forward(c, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT), cache)
    logits_BV = hidden_BTD[:, -1].astype(jnp.float32) @ model.head(c, params)
    return logits_BV, cache

  def draw(carry, t):
    logits_BV, cache = carry
    token_B = jax.random.categorical(jax.random.fold_in(key, t), logits_BV).astype(jnp.int32)
    position_B1 = jnp.full((rows, 1), length + t, jnp.int32)
    return feed(token_B[:, None], position_B1, cache), token_B

  position_BP = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), prompt_BP.shape)
  start = feed(prompt_BP, position_BP, model.empty_cache(c, rows, length + new_tokens))
  _, tokens_TB = jax.lax.scan(draw, start, jnp.arange(new_tokens))
  return tokens_TB.T


def sample_texts(
  c: model.ModelConfig, params: Any, tokenizer: Tokenizer, prompt_BP: np.ndarray, *, new_tokens: int, key: jax.Array
) -> list[tuple[str, str]]:
  """(prompt, continuation) for each row of prompt tokens; a text ends at its end-of-document token."""
  texts = []
  for prompt_P, new_T in zip(prompt_BP, np.asarray(_continue(c, params, jnp.asarray(prompt_BP), key, new_tokens))):
    ends = np.flatnonzero(new_T == tokenizer.eos)
    new_T = new_T[: ends[0]] if ends.size else new_T
    texts.append((tokenizer.decode(prompt_P.tolist()), tokenizer.decode(new_T.tolist())))
  return texts
