"""Holds a checkpoint in memory on one device, for the commands that a person looks through: generate and explore."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from betarank import data, model
from betarank.configs import load, settings
from betarank.eval import config
from betarank.eval.config import CheckpointRef, EvalError, EvalRun
from betarank.eval.report.arms import label
from betarank.model import MeshConfig
from betarank.train import setup
from betarank.train.sampler import Prompt, Sample, Sampler, SamplerConfig

_SHORTEST_ROOM = 32  # tokens for a prompt; a longer one has the next power of two, so that few shapes are compiled
_DECODE_STEPS = 4  # tokens drawn between two looks at them


class Loaded(NamedTuple):
  """A checkpoint with its parameters.

  Attributes:
    ref: which checkpoint.
    run: its settings.
    name: of its workdir, as the user gave it.
    objective: of the pre-training that it descends from, by what differs from plain cross-entropy: 'CE', 'β = -0.25'.
    tokenizer: the one that it was trained with.
    params: float32, on the first device.
  """

  ref: CheckpointRef
  run: EvalRun
  name: str
  objective: str
  tokenizer: data.Tokenizer
  params: Any


def load_model(path: str, tokenizer: str = '') -> Loaded:
  """Loads the checkpoint at `path`, or the newest one if `path` is a workdir.

  The kernels are those of this machine, whatever the run used on its own. tokenizer: where the one that it was trained
  with is now, if not in its old place.

  Raises CheckpointError, ConfigError or DataError, each with a one-line message.
  """
  load.check_places({'RUN': path}, '')
  [ref] = config.find_checkpoints(path)
  resolved = config.configure(ref)
  resolved.model.attention = settings.default('model.attention')
  resolved.model.moe.kernel = settings.default('model.moe.kernel')
  resolved.data.tokenizer = tokenizer or resolved.data.get('tokenizer', '')
  run = config.eval_run(resolved, ref)
  mesh = model.make_mesh(MeshConfig(1, 1, 1, 1, 1), jax.devices()[:1])
  objective = label(setup.whole_config(ref.meta).get('objective')) or 'objective unknown'
  return Loaded(ref, run, str(ref.run), objective, config.read_tokenizer(run, ref), config.restore(run, ref, mesh))


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to continue a text; see SamplerConfig. Raises EvalError that names the flag."""

  temperature: float = 1.0
  top_p: float = 1.0
  max_new_tokens: int = 256
  seed: int = 0

  def __post_init__(self):
    if not 0 <= self.seed < 2**32:
      raise EvalError(f'--seed must be in [0, 2^32), got {self.seed}')
    try:
      self.sampler(1, 1)
    except ValueError as error:
      raise EvalError(f'--{error}') from None

  def sampler(self, rows: int, prompt_tokens: int) -> SamplerConfig:
    room = max(_SHORTEST_ROOM, 1 << (prompt_tokens - 1).bit_length())
    return SamplerConfig(rows, room, self.max_new_tokens, self.temperature, self.top_p, decode_steps=_DECODE_STEPS)


def sample(
  loaded: Loaded, prompt: Sequence[int], sampling: Sampling, indices: Sequence[int], step: int = 0,
  watch: Callable[[Sample], None] | None = None,
) -> list[Sample]:
  """Returns continuations of the prompt, token ids without BOS, in the order of their `indices`.

  step: another number gives other continuations. watch: called with what is drawn, as it is drawn (see Sampler).
  """
  tokens = [loaded.tokenizer.bos, *prompt]
  draw = _sampler(loaded.run.model, sampling.sampler(len(indices), len(tokens)), loaded.tokenizer.eos)
  [group] = draw(loaded.params, [Prompt(0, tokens)], samples=indices, seed=sampling.seed, step=step, watch=watch)
  return group


_sampler = functools.lru_cache(maxsize=16)(Sampler)  # holds no parameters, but a program that takes time to compile


def continuation(drawn: Sample) -> np.ndarray:
  """Returns a sample's tokens without EOS."""
  return drawn.tokens[:-1] if drawn.finish == 'eos' else drawn.tokens
