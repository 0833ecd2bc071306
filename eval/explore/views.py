"""Builds what the page of `betarank explore` shows, as JSON values: a text or a problem, with the predictions of
several checkpoints.

A *passage* is a sequence of tokens with the predictions of each checkpoint. A *view* is what the page shows at one
time. It has one passage for a prompt, and one passage for each continuation of the prompt:

    {'prompt': passage, 'samples': [passage, ...], 'vocabulary': {id: text}, 'problem': {...} or None, 'note': text}

'note' is a remark that the page shows, such as that only a part of a document is shown; '' for none.
The text of a token is found in 'vocabulary'. If a token holds only a part of a character, its text depends on the
tokens next to it. A passage has the texts of such tokens as {position: text}.
"""

import dataclasses
import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from betarank.data.config import DataError
from betarank.data.prepared import Documents
from betarank.eval.config import EvalError
from betarank.eval.explore.figures import Figures, figures
from betarank.eval.loaded import Loaded, Sampling, sample
from betarank.eval.token_texts import texts_of, token_text
from betarank.tasks.task_set import TaskConfig, TaskSet
from betarank.tasks.verifiers import Verifier
from betarank.train import setup

MOST_TOKENS = 2048  # of a text
MOST_SAMPLES = 16  # per checkpoint
MOST_NEW_TOKENS = 1024
MOST_PROBLEMS = 10**9 - 1  # number of the last one that is asked of a task without end
NAMES = {'CE': 'β = 0'}


@dataclasses.dataclass(frozen=True)
class Explorer:
  """The checkpoints that the page shows, and the texts and problems that a user can choose.

  Attributes:
    models: the checkpoints, which must have the same tokenizer.
    top_k: the number of most probable tokens that form the head, as in figures.figures.
    sources: {name of a data source: the documents of its validation split}.
    tasks: the problems; None if there are none.
    verifier: judges answers to the problems.
    lock: held during a computation, so that only one computation runs at a time.
  """

  models: Sequence[Loaded]
  top_k: int
  sources: Mapping[str, Documents]
  tasks: TaskSet | None
  verifier: Verifier
  lock: Any = dataclasses.field(default_factory=threading.Lock)

  def about(self) -> dict[str, Any]:
    """Returns what the page shows before a text is chosen: the checkpoints, the data sources, and the task."""
    models = [{'label': text, 'name': m.name, 'step': m.ref.step} for text, m in zip(labels(self.models), self.models)]
    task = None if self.tasks is None else {'uri': self.tasks.config.uri, 'size': self.tasks.size}
    return {'models': models, 'top_k': self.top_k, 'vocab_size': self.models[0].run.model.vocab_size,
            'sources': {name: len(documents) for name, documents in self.sources.items()}, 'task': task}

  def text(self, text: str, samples: int = 0, sampling: Sampling | None = None) -> dict[str, Any]:
    """Returns the view (see the docstring of this module) of a text, with `samples` continuations by each checkpoint.

    sampling: the settings of sampling; needed only if `samples` isn't 0.

    Raises:
      EvalError: the text is too long, or an argument is too large.
    """
    return self._view(text, samples, sampling, None)

  def document(self, source: str, index: int) -> dict[str, Any]:
    """Returns the view (see the docstring of this module) of document number `index` in a source's validation split.

    Only the first MOST_TOKENS / 2 tokens of the document are used. If it has more, the view's note says so.

    Raises:
      EvalError: there is no such source or document.
    """
    if source not in self.sources:
      raise EvalError(f'no source {source!r}; there are {", ".join(self.sources) or "none"}')
    documents = self.sources[source]
    if not 0 <= index < len(documents):
      raise EvalError(f'{source} has documents 0 to {len(documents) - 1}, got {index}')
    [tokens] = documents.read([index])
    most = MOST_TOKENS // 2
    view = self.text(self._tokenizer.decode(tokens[:most].tolist()))
    if len(tokens) > most:
      view['note'] = f'Only the first {most:,} of the {len(tokens):,} tokens of this document are shown.'
    return view

  def problem(self, index: int, samples: int, sampling: Sampling) -> dict[str, Any]:
    """Returns the view (see the docstring of this module) of problem number `index`.

    The view has `samples` answers by each checkpoint, with their verdicts.

    Raises:
      EvalError: there is no such problem, or an argument is too large.
    """
    if self.tasks is None:
      raise EvalError('there are no problems; name a task with --task=reasoning:NAME or --task=jsonl:FILE')
    last = MOST_PROBLEMS if self.tasks.size is None else self.tasks.size - 1
    if not 0 <= index <= last:
      raise EvalError(f'problems are numbered 0 to {last}, got {index}')
    with self.lock:
      task = self.tasks[index]
    return self._view(task.prompt, samples, sampling, task)

  @property
  def _tokenizer(self):
    return self.models[0].tokenizer

  def _view(self, text, samples, sampling, task):
    if not 0 <= samples <= MOST_SAMPLES:
      raise EvalError(f'samples must be in [0, {MOST_SAMPLES}], got {samples}')
    if samples and sampling.max_new_tokens > MOST_NEW_TOKENS:
      raise EvalError(f'max_new_tokens must be at most {MOST_NEW_TOKENS}, got {sampling.max_new_tokens}')
    prompt = self._tokenizer.encode(text).tolist()
    if len(prompt) > MOST_TOKENS:
      raise EvalError(f'the text has {len(prompt)} tokens; at most {MOST_TOKENS} are shown')
    with self.lock:
      drawn = [(m, one) for m, loaded in enumerate(self.models) if samples
               for one in sample(loaded, prompt, sampling, range(samples))]
      rows = [prompt, *([*prompt, *one.tokens.tolist()] for _, one in drawn)]
      found = list(zip(*(self._figures(loaded, rows) for loaded in self.models)))
    view = {'text': text, 'prompt': self._passage(prompt, found[0], 0), 'problem': None, 'note': ''}
    view['samples'] = [
      {**self._passage(row, of_models, len(prompt)), 'by': m, 'finish': one.finish}
      for (m, one), row, of_models in zip(drawn, rows[1:], found[1:])]
    if task:
      texts = [self._tokenizer.decode(one.text_tokens) for _, one in drawn]
      for shown, grade in zip(view['samples'], self.verifier.grade([(t, task) for t in texts])):
        shown |= {'verdict': grade.verdict.name.lower(), 'answer': grade.answer, 'rule': grade.rule}
      view['problem'] = {'question': task.question, 'reference': task.reference, 'id': task.id}
    view['vocabulary'] = self._vocabulary([view['prompt'], *view['samples']])
    return view

  def _passage(self, row, of_models, start):
    """Returns a passage: tokens with the predictions of each checkpoint (see the docstring of this module).

    row: the token ids of a whole text, without BOS.
    of_models: the predictions of each checkpoint for `row`, as Figures.
    start: the index in `row` at which the passage starts.
    """
    tokens = [int(token) for token in row[start:]]
    texts = {i: text for i, (token, text) in enumerate(zip(tokens, texts_of(self._tokenizer, tokens)))
             if text != token_text(self._tokenizer, token)}
    return {'tokens': tokens, 'texts': texts, 'figures': [_rounded(f, start) for f in of_models]}

  def _figures(self, loaded, rows):
    found = figures(loaded, rows, self.top_k)
    if not all(np.isfinite(x).all() for f in found for x in f):
      raise EvalError(f'{loaded.ref.path}: predicts values that are no finite numbers')
    return found

  def _vocabulary(self, passages):
    """Returns {token id: text} for all tokens of `passages`, and for the most probable tokens at each position."""
    used = {token for p in passages for token in p['tokens']}
    used |= {token for p in passages for f in p['figures'] for top in f['top'] for token in top}
    return {token: token_text(self._tokenizer, token) for token in sorted(used)}


def labels(models: Sequence[Loaded]) -> list[str]:
  """Returns a name for each checkpoint: its objective, followed by ' + RL' for a checkpoint of an RL run.

  If several checkpoints would have the same name, each name also gets the checkpoint's step, the part of its workdir
  that differs, or both.
  """
  short = [NAMES.get(m.objective, m.objective) + (' + RL' if 'rl' in m.ref.meta['config'] else '') for m in models]

  def name(model, text):
    same = [m for m, other in zip(models, short) if other == text]
    if len(same) == 1:
      return text
    if len({m.ref.step for m in same}) == len(same):
      return f'{text}, step {model.ref.step}'
    parts = zip(*(m.name.split('/') for m in same))
    shared = sum(1 for _ in itertools.takewhile(lambda part: len(set(part)) == 1, parts))
    found = f'{text}, {"/".join(model.name.split("/")[shared:]) or model.name}'
    return found if len({m.name for m in same}) == len(same) else f'{found}, step {model.ref.step}'

  return [name(*pair) for pair in zip(models, short)]


def _rounded(f: Figures, start: int) -> dict[str, Any]:
  """Returns the predictions for token `start` and all later tokens, as JSON values with six significant digits."""
  number = lambda x: float(f'{x:.6g}')
  values = {name: [number(x) for x in getattr(f, name)[start:]] for name in ('logp', 'entropy', 'head', 'tail')}
  return {**values, 'rank': f.rank[start:].tolist(), 'top': f.top[start:].tolist(),
          'top_logp': [[number(x) for x in row] for row in f.top_logp[start:]]}


def open_sources(loaded: Loaded) -> dict[str, Documents]:
  """Opens the validation splits of the data that a checkpoint was trained on. Returns {source: documents}.

  A source is left out if this machine doesn't have its data.
  """
  found = {}
  for name in loaded.run.data.sources:
    try:
      found[name] = Documents(loaded.run.data, name, 'validation')
    except DataError:
      continue  # trained elsewhere, or the data was deleted since
  return found


def open_tasks(models: Sequence[Loaded], uri: str) -> TaskSet | None:
  """Returns the problems of a task; None if there is no task.

  If `uri` is '', the task is chosen in this order:

  - the task of the first model that was trained with RL
  - the first source of generated problems in the models' training data

  If a part of the generated problems was held out of training, only this part is returned.

  models: the checkpoints.
  uri: the URI of the task, such as 'reasoning:chain_sum'; '' to choose one.

  Raises:
    EvalError: the task can't be used.
    DataError: the problems of the task can't be read.
  """
  configs = [m.ref.meta['config'] for m in models]
  of_rl = [c['rl']['task'] for c in configs if 'rl' in c]
  sources = [s.uri for m in models for s in m.run.data.sources.values() if s.uri.startswith('reasoning:')]
  given = dict(of_rl[0]) if of_rl else {}
  uri = uri or given.get('uri') or (sources[0] if sources else '')
  if not uri:
    return None
  if uri.startswith('code:'):
    raise EvalError(f'--task={uri}: programs are not judged here; betarank eval sample does it')
  held_out = [*(setup.left_out(m.ref.meta) for m in models),
              *(float(task.get('held_out_fraction', 0)) for task in of_rl)]
  share = min([x for x in held_out if x < 1] or [0.0]) if uri.startswith('reasoning:') else 0.0
  kept = {name: given[name] for name in ('prompt', 'answer_format') if name in given}
  try:
    task = TaskConfig(uri, **kept, held_out_fraction=share)
  except ValueError as error:
    raise EvalError(f'--task={uri}: {error}') from None
  return TaskSet(task, split='held_out' if share else 'all')


def check_same_tokens(models: Sequence[Loaded]) -> None:
  """Raises EvalError if the checkpoints have different tokenizers."""
  for other in models[1:]:
    if other.tokenizer.sha256 != models[0].tokenizer.sha256:
      raise EvalError(f'{other.name} and {models[0].name} have different tokenizers, so their tokens cannot be shown '
                      'side by side; look at them one at a time')
