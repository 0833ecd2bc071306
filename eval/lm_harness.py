"""Runs the tasks of lm-evaluation-harness on betarank's own model and sampler, without converting the checkpoint.

    betarank eval harness --checkpoint=RUN --tasks=hellaswag,arc_easy [--num_fewshot=N] [--limit=N]
    lm_eval.simple_evaluate(model='betarank', model_args='checkpoint=RUN', tasks=[...])     after importing this module

Inputs are built and truncated as in `hf`, the harness's own model for Hugging Face. Equal weights therefore give equal
scores in both. In detail:

- BOS is added to the beginning of every text, before the text is truncated or divided into windows.
- Spaces at the end of a context are moved to the continuation.
- Inputs that are too long lose their first tokens.
- Rolling windows don't overlap.
- If the tokenizer has a BOS token, a rolling likelihood includes the probability of a second BOS after the first.

In a job of several processes, the harness runs in every process, with the same tasks. The rows of a batch are spread
over the devices of all processes. Process 0 writes the results.

# B rows  T tokens of a row
"""

import collections
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import lm_eval
import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from betarank import data, model
from betarank.configs import errors, load
from betarank.configs.files import write_atomically
from betarank.eval import generation_kwargs
from betarank.eval.config import (
  CheckpointRef,
  EvalError,
  EvalRun,
  configure,
  difference,
  eval_run,
  find_checkpoints,
  make_mesh,
  read_tokenizer,
  restore,
)
from betarank.model.sharding import constrain
from betarank.runtime import multihost
from betarank.train import score, setup
from betarank.train.sampler import Prompt, Sampler, SamplerConfig

_SHORTEST = 64  # rows are padded to so many tokens times a power of two, so that few shapes are compiled
_DEFAULT_NEW_TOKENS = 256  # the harness's own default
_Request = tuple[Any, list[int], list[int]]  # the request's name, its context and continuation as tokens


@register_model('betarank')
class Betarank(TemplateLM):
  """Makes a checkpoint available to lm-evaluation-harness as a model.

  Attributes:
    max_length: the maximum sequence length in tokens; by default the longest that the checkpoint was trained on.
  """

  def __init__(
    self, checkpoint: str | CheckpointRef, run: EvalRun | None = None, *, max_length: int = 0,
    batch_size: int | None = None, device: str | None = None, max_batch_size: int | None = None, **settings: Any,
  ):
    """Loads the checkpoint.

    Args:
      checkpoint: a checkpoint, or the path of a checkpoint or a workdir. For a workdir, the newest checkpoint is used.
      run: the settings of the evaluation. None means the settings of the checkpoint's config, with the changes in
        `settings`.
      max_length: the maximum sequence length in tokens; 0 means the longest that the checkpoint was trained on.
      batch_size: the number of rows per forward pass. None means eval.probe.batch_size.
      device, max_batch_size: ignored. The harness passes these arguments to every model.
      settings: changed settings, such as {'eval.probe.rows': 8}. They are ignored if `run` is given.

    Raises:
      ConfigError, DataError, EvalError or CheckpointError: the checkpoint or a setting can't be used.
    """
    super().__init__()
    subject = checkpoint if isinstance(checkpoint, CheckpointRef) else find_checkpoints(checkpoint)[-1]
    if run is None:
      config = configure(subject)
      for key, value in settings.items():
        load.override(config, key, str(value))
      run = eval_run(config, subject)
    self._run, self._rank, self._world_size = run, 0, 1
    # Rows have other lengths than in training, and not every kernel supports them.
    self._model = dataclasses.replace(run.model, attention='auto')
    self.max_length = max_length or setup.trained_length(subject.meta)
    self.batch_size = int(batch_size or run.eval.probe.batch_size)
    self._tokens = read_tokenizer(run, subject)
    self._mesh = make_mesh(run, 'eval.probe.batch_size', self.batch_size)
    self._device = self._mesh.devices.flat[0].platform
    with jax.set_mesh(self._mesh):
      self._params = restore(run, subject, self._mesh)

  @property
  def eot_token_id(self) -> int:
    return self._tokens.eos

  @property
  def prefix_token_id(self) -> int:
    return self._tokens.bos

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
    ids = self._tokens.encode(string).tolist()
    return ids if add_special_tokens is False else [self._tokens.bos, *ids]

  # Likelihoods

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    windows = []
    for number, request in enumerate(requests):
      parts = utils.get_rolling_token_windows(
        token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
        context_len=1)
      windows += [(number, *utils.make_disjoint_window(part)) for part in parts]
    totals = [0.0] * len(requests)
    for (number, *_), (logp, _) in zip(windows, self._score(windows)):
      totals[number] += logp
    for request, total in zip(requests, totals):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
    return totals

  def _loglikelihood_tokens(self, requests: list[_Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    answers = self._score(requests)
    for (request, *_), answer in zip(requests, answers):
      self.cache_hook.add_partial('loglikelihood', request, answer)
    return answers

  def _score(self, requests: Sequence[_Request]) -> list[tuple[float, bool]]:
    """Returns (log-probability in nats, greedy) of each request's continuation, in the order of the requests.

    `greedy` is True if every token of the continuation is the most probable one, so that greedy decoding would give it.

    requests: the name, the context's token ids and the continuation's token ids of each request.

    Raises:
      EvalError: a context or a continuation is empty, a continuation is longer than max_length, or the processes of a
        job have different requests.
    """
    rows = []
    for name, context, continuation in requests:
      if not context or not 0 < len(continuation) <= self.max_length:
        raise EvalError(f'{str(name)[:80]!r}: {len(context)} tokens of context and {len(continuation)} to be scored; '
                        f'there must be some of both, and at most {self.max_length} to be scored')
      rows.append(((context + continuation)[-(self.max_length + 1):], len(continuation)))
    _check_alike(rows)
    answers: list[Any] = [None] * len(rows)
    longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    for start in range(0, len(rows), self.batch_size):
      some = longest_first[start:start + self.batch_size]
      tokens_BT = np.zeros((self.batch_size, self._padded(len(rows[some[0]][0]) - 1) + 1), np.int32)
      live_BT = np.zeros((self.batch_size, tokens_BT.shape[1] - 1), np.int32)
      for b, i in enumerate(some):
        tokens_BT[b, : len(rows[i][0])] = rows[i][0]
        live_BT[b, : len(rows[i][0]) - 1] = 1
      with jax.set_mesh(self._mesh):
        logp_BT, greedy_BT = jax.device_get(_score(self._model, self._params, tokens_BT, live_BT))
      for b, i in enumerate(some):
        tokens, count = rows[i]
        asked = slice(len(tokens) - 1 - count, len(tokens) - 1)
        answers[i] = float(logp_BT[b, asked].sum(dtype=np.float64)), bool(greedy_BT[b, asked].all())
    return answers

  def _padded(self, length: int) -> int:
    """Returns the length to which a row of `length` tokens is padded, so that few shapes are compiled.

    It is the smallest _SHORTEST * 2**i that is at least `length`. If this exceeds max_length, it is max_length rounded
    up to a multiple of _SHORTEST.
    """
    powers = max(0, (-(-length // _SHORTEST) - 1).bit_length())
    return min(_SHORTEST << powers, -(-self.max_length // _SHORTEST) * _SHORTEST)

  # Texts

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """Returns one generated text per request, each cut at its first stop string.

    Decoding is greedy unless the task asks for sampling. Texts are generated until EOS or until they have max_gen_toks
    tokens. They are cut at the stop strings afterwards.

    requests: the harness's requests, each with a prompt and generation_kwargs.
    disable_tqdm: ignored. The harness passes it.

    Raises:
      EvalError: generation_kwargs has a value that isn't supported, or the processes of a job have different requests.
    """
    alike = collections.defaultdict(list)
    for i, request in enumerate(requests):
      alike[json.dumps(request.args[1], sort_keys=True)].append(i)
    texts: list[str] = [''] * len(requests)
    for key, members in alike.items():
      until, s = generation_kwargs.sampler_config(
        normalize_gen_kwargs(json.loads(key), _DEFAULT_NEW_TOKENS), self.max_length,
        self._run.eval.sample.decode_batch_size)
      contexts = [self.tok_encode(requests[i].args[0])[-s.max_prompt_tokens:] for i in members]
      _check_alike([key, contexts])
      for i, text in self._draw(s, [Prompt(i, tokens) for i, tokens in zip(members, contexts)]):
        texts[i] = postprocess_generated_text(text, until, None)
        self.cache_hook.add_partial('generate_until', requests[i].args, texts[i])
    return texts

  def _draw(self, s: SamplerConfig, prompts: list[Prompt]) -> Iterator[tuple[int, str]]:
    try:
      sampler = Sampler(self._run.model, s, self._tokens.eos, self._mesh)
    except ValueError as error:
      raise EvalError(f'config.eval.sample.{error}') from None
    for [sample] in sampler(self._params, prompts, samples=1, seed=self._run.eval.sample.seed, step=0):
      yield sample.prompt_id, self._tokens.decode(sample.text_tokens)


def _check_alike(asked: Any) -> None:
  """Raises EvalError if this process and process 0 have different inputs for a task.

  All processes compute every row together, so their inputs must be equal. Inputs can differ, for example in the worked
  examples, if the hosts have different files or different versions of a package.

  asked: the inputs, as a value that can be converted to JSON.
  """
  mine = np.frombuffer(hashlib.sha256(json.dumps(asked).encode()).digest(), np.uint8)
  if not np.array_equal(mine, multihost.of_first_process(mine)):
    raise EvalError(f'process {jax.process_index()}: the task asks for other texts here than in process 0; its files, '
                    'or the versions of lm_eval and datasets, differ between the hosts')


@functools.partial(jax.jit, static_argnums=0)
def _score(c: model.ModelConfig, params: Any, tokens_BT: jax.Array, live_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (log-probabilities float32 in nats, greedy bool), both [B, T - 1].

  Entry t is for token t + 1, given the tokens up to t. `greedy` is True where this token is the most probable one.

  tokens_BT: the token ids [B, T].
  live_BT: int32 [B, T - 1], 0 where token t + 1 is padding, else 1.
  """
  positions_BT = jnp.broadcast_to(jnp.arange(live_BT.shape[1]), live_BT.shape)
  batch = data.Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], positions_BT, live_BT)
  stats, _ = score.token_stats(c, params, batch, top_k=1)
  return constrain(stats.target_logp, None, None), constrain(stats.target_rank == 0, None, None)


# The command


def harness(
  run: EvalRun, subjects: Sequence[CheckpointRef], tasks: str, *, num_fewshot: int | None, limit: int | None,
  include_path: str, max_length: int, say: Callable[..., None] = print,
) -> None:
  """Runs tasks of lm-evaluation-harness on each checkpoint, prints the harness's table, and writes the results to
  RUN/eval/harness/TASKS/STEP.json.

  A checkpoint is skipped if its file already exists and was written with the same settings.

  Args:
    run: the settings of the evaluation.
    subjects: the checkpoints to evaluate.
    tasks: the names of the tasks, separated by commas.
    num_fewshot: the number of worked examples; None means the number that each task defines.
    limit: the largest number of documents per task; None means all documents.
    include_path: a folder with the user's own tasks; '' for none.
    max_length: the maximum sequence length in tokens; 0 means the longest that the checkpoint was trained on.
    say: a function that prints a line.

  Raises:
    ConfigError, DataError, EvalError or CheckpointError: a checkpoint, a setting or a task can't be used.
  """
  first = jax.process_index() == 0
  say = say if first else lambda *_, **__: None
  if not (names := [name for name in tasks.split(',') if name]):
    raise EvalError('--tasks: name one or more of lm-evaluation-harness\'s, separated by commas')
  folder = re.sub(r'[^\w.+-]+', '_', '+'.join(names))
  asked = {'tasks': names, 'num_fewshot': num_fewshot, 'limit': limit, 'seed': run.eval.sample.seed,
           'lm_eval': lm_eval.__version__}
  todo = []
  for subject in subjects:
    path = subject.run / 'eval' / 'harness' / folder / f'{subject.step}.json'
    settings = {**asked, 'max_length': max_length or setup.trained_length(subject.meta)}
    there = path.exists() and not difference(json.loads(path.read_text()), settings, list(settings))
    if multihost.of_first_process(np.array(there)):
      say(f'{path}: is there already')
    else:
      todo.append((subject, path, settings))
  manager = TaskManager(include_path=include_path or None) if todo else None  # creating a TaskManager is slow
  for subject, path, settings in todo:
    if unknown := [name for name in names if name not in manager.all_tasks]:
      raise EvalError(f'--tasks={unknown[0]}: no such task{errors.suggestion(unknown[0], manager.all_tasks)}')
    found = lm_eval.simple_evaluate(
      Betarank(subject, run, max_length=max_length), tasks=names, num_fewshot=num_fewshot, limit=limit,
      task_manager=manager, log_samples=False, bootstrap_iters=1000)
    kept = {key: found[key] for key in ('results', 'groups', 'n-shot', 'n-samples', 'versions') if key in found}
    if first:
      write_atomically(path, json.dumps({**subject.lineage(), **settings, **kept}, indent=1, default=str) + '\n')
    say(f'step {subject.step}\n{utils.make_table(found)}')
    say(f'{path}: written', flush=True)
