"""Loads a checkpoint onto one device and samples from it, for the interactive commands `generate` and `explore`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from betarank import data
from betarank.configs import settings
from betarank.eval import config
from betarank.eval.config import CheckpointRef, EvalError, EvalRun
from betarank.eval.report.arms import label
from betarank.model import MeshConfig
from betarank.runtime.program_cache import keep_programs
from betarank.train import setup
from betarank.train.sampler import Prompt, Sample, Sampler, SamplerConfig

# Room for a prompt, in tokens. For a longer prompt it is the next power of two, so that few shapes are compiled.
_SHORTEST_ROOM = 32
_DECODE_STEPS = 4  # tokens drawn per dispatch, that is, before they are shown


class Loaded(NamedTuple):
  """A checkpoint that has been loaded for sampling.

  Attributes:
    ref: the checkpoint's path, step and metadata.
    run: the settings of the model, its data and its evaluation.
    name: the path of the checkpoint's workdir.
    objective: a short name for the objective of the checkpoint's pre-training, such as 'CE' or 'β = -0.25' (see
      report/arms.py, `label`); 'objective unknown' if it isn't recorded.
    tokenizer: the tokenizer that the model was trained with.
    params: the parameters, a pytree of float32 arrays on the first device.
  """

  ref: CheckpointRef
  run: EvalRun
  name: str
  objective: str
  tokenizer: data.Tokenizer
  params: Any


def load_model(path: str, tokenizer: str | None = None) -> Loaded:
  """Loads the checkpoint at `path` onto the first device. If `path` is a workdir, loads its newest checkpoint.

  The model uses the kernels that are the default on this machine, whatever kernels its config names.

  Args:
    path: a workdir or a checkpoint.
    tokenizer: the path of the tokenizer that the model was trained with. It is needed only if the tokenizer has been
      moved.

  Raises:
    CheckpointError, ConfigError, DataError: the checkpoint, its config or its tokenizer can't be read.
  """
  [ref] = config.find_checkpoints(path)
  resolved = config.configure(ref)
  resolved.model.attention = settings.default('model.attention')
  resolved.model.moe.kernel = settings.default('model.moe.kernel')
  resolved.data.tokenizer = tokenizer or resolved.data.get('tokenizer', '')
  run = config.eval_run(resolved, ref)
  keep_programs()
  mesh = setup.make_mesh(MeshConfig(1, 1, 1, 1, 1), run.model, {}, jax.devices()[:1])
  objective = label(setup.whole_config(ref.meta).get('objective')) or 'objective unknown'
  return Loaded(ref, run, str(ref.run), objective, config.read_tokenizer(run, ref), config.restore(run, ref, mesh))


@dataclasses.dataclass(frozen=True)
class Sampling:
  """The settings with which a text is continued.

  The fields `temperature`, `top_p` and `max_new_tokens` have the same meaning as in SamplerConfig. `seed` is the seed
  of the random numbers, in [0, 2^32).

  Raises:
    EvalError: a value is not allowed. The message names the command-line flag.
  """

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
    """Returns the settings of a sampler that draws up to `rows` continuations at once, of a prompt of `prompt_tokens`
    tokens.
    """
    room = max(_SHORTEST_ROOM, 1 << (prompt_tokens - 1).bit_length())
    return SamplerConfig(rows, room, self.max_new_tokens, self.temperature, self.top_p, decode_steps=_DECODE_STEPS)


def sample(
  loaded: Loaded, prompt: Sequence[int], sampling: Sampling, indices: Sequence[int], step: int = 0,
  watch: Callable[[Sample], None] | None = None,
) -> list[Sample]:
  """Draws continuations of a prompt, and returns them in the order of `indices`.

  The same seed, step and index always give the same continuation.

  Args:
    prompt: token ids, without BOS.
    indices: different integers in [0, 2^32), one for each continuation to draw.
    step: an integer in [0, 2^32). With another step, the random numbers are different.
    watch: a function that is called with the new tokens while they are drawn, as in `Sampler.__call__`.
  """
  tokens = [loaded.tokenizer.bos, *prompt]
  draw = _sampler(loaded.run.model, sampling.sampler(len(indices), len(tokens)), loaded.tokenizer.eos)
  [group] = draw(loaded.params, [Prompt(0, tokens)], samples=indices, seed=sampling.seed, step=step, watch=watch)
  return group


_sampler = functools.lru_cache(maxsize=16)(Sampler)  # because a sampler compiles a program; it holds no parameters
