"""Computes what a checkpoint predicts at each token of a few texts.

# B texts  T tokens of a row  N tokens of one text  D width  V vocabulary  n most probable tokens that are shown
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from betarank import model
from betarank.data import Batch
from betarank.eval.loaded import Loaded
from betarank.train import score

SHOWN = 20  # most probable tokens per position
_AT_ONCE = 64  # positions whose logits exist at the same time
_SHORTEST = 16  # a shorter text is padded to this many tokens


class Figures(NamedTuple):
  """A model's predictions for one text of N tokens, with temperature 1. Log-probabilities and entropies are in nats.

  Entry i < N is the prediction of token i, given BOS and the tokens before token i. Entry N is the prediction after the
  last token. This prediction has no target, so only `entropy`, `top` and `top_logp` have an entry N.

  Attributes:
    logp: float32 [N], the log-probability of each token.
    rank: int32 [N], the rank of each token; 0 for the most probable token.
    entropy: float32 [N + 1], the entropy of the predicted distribution.
    head: float32 [N], the probability of the wrong tokens among the top_k most probable tokens (see `figures`).
    tail: float32 [N], the probability of all other wrong tokens. exp(logp) + head + tail = 1.
    top: int32 [N + 1, n], the ids of the n most probable tokens, the most probable token first.
    top_logp: float32 [N + 1, n], the log-probabilities of the tokens in `top`.
  """

  logp: np.ndarray
  rank: np.ndarray
  entropy: np.ndarray
  head: np.ndarray
  tail: np.ndarray
  top: np.ndarray
  top_logp: np.ndarray


def figures(loaded: Loaded, texts: Sequence[Sequence[int]], top_k: int) -> list[Figures]:
  """Returns the model's predictions for each text, computed in one forward pass.

  Batch size and length are rounded up to powers of two, so that only few shapes are compiled.

  Args:
    texts: the token ids of each text, without BOS.
    top_k: the number of most probable tokens that form the head (see Figures.head).
  """
  c, tokenizer = loaded.run.model, loaded.tokenizer
  longest = max(_SHORTEST, *(len(text) + 1 for text in texts))
  B, T = (1 << (size - 1).bit_length() for size in (len(texts), longest))
  tokens_BT, targets_BT, segments_BT = (np.zeros((B, T), np.int32) for _ in range(3))
  for b, text in enumerate(texts):
    end = len(text) + 1
    tokens_BT[b, :end] = [tokenizer.bos, *text]
    targets_BT[b, :end] = [*text, tokenizer.eos]
    segments_BT[b, :end] = 1
  positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  batch = Batch(tokens_BT, targets_BT, positions_BT, segments_BT)
  shown = min(SHOWN, c.vocab_size)
  values = jax.device_get(_values(c, min(top_k, c.vocab_size), shown, loaded.params, batch))
  found = []
  for b, text in enumerate(texts):
    N = len(text)
    x = {name: value[b] for name, value in values.items()}
    found.append(Figures(x['logp'][:N], x['rank'][:N], x['entropy'][: N + 1], x['head'][:N], x['tail'][:N],
                         x['top'][: N + 1], x['top_logp'][: N + 1]))
  return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _values(c: model.ModelConfig, top_k: int, shown: int, params: Any, batch: Batch) -> dict[str, jax.Array]:
  """Returns {name of a field of Figures: array}. `top` and `top_logp` are [B, T, n], the other arrays are [B, T].

  The last position of a text has no target, so fields that depend on a target are meaningless there. All fields are
  meaningless in padding.

  top_k: as in `figures`.
  shown: the number n of tokens in `top` and `top_logp`.
  """
  stats, hidden_BTD = score.token_stats(c, params, batch, top_k)
  head_DV = model.head(c, params)

  def leading(hidden_D):
    return jax.lax.top_k(jax.nn.log_softmax(score.logits(c, hidden_D[None], head_DV)[0]), shown)

  flat_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
  logp_Nn, ids_Nn = jax.lax.map(leading, flat_ND, batch_size=_AT_ONCE)
  shape = (*batch.tokens_BT.shape, shown)
  return {'logp': stats.target_logp, 'rank': stats.target_rank, 'entropy': stats.entropy, 'head': stats.head_mass,
          'tail': stats.tail_mass, 'top': ids_Nn.reshape(shape).astype(jnp.int32), 'top_logp': logp_Nn.reshape(shape)}
