"""Defines what an RL run carries from step to step besides its training state.

Checkpoints save this progress as the run's cursor. It decides which prompts come next, and which checkpoint is kept as
the best one. Both decisions depend only on the seed and on what was recorded so far, so a resumed run makes the same
decisions as an uninterrupted run.

A run may have a difficulty filter, which skips a share of the prompts whose last group of samples had zero variance,
for example because all samples were right.

# N tasks of the set
"""

import base64
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from betarank.data import DataError
from betarank.tasks.task_set import Task, TaskSet

_MOST_MISSED = 10_000


@dataclasses.dataclass(frozen=True)
class Best:
  """The best evaluation so far. If several are equally good, this is the earliest of them.

  Attributes:
    metric: the name under which the result is logged, such as eval/held_out/avg_at_16.
    step: the step after which the policy was evaluated; 0 for the policy at the start.
    value: the result.
    problems: SHA-256 of the problems that were evaluated on; '' in checkpoints from before 2026-11-29. They are assumed
      to be those of the next evaluation.
  """

  metric: str
  step: int
  value: float
  problems: str = ''


@dataclasses.dataclass(frozen=True)
class Progress:
  """The progress of a run, which decides which prompts come next and which checkpoint is the best.

  Attributes:
    prompts: the number of prompts that were used or skipped so far.
    zero_variance_N: bool [N], for each of the N tasks of the set: True if the last group drawn for the task had zero
      variance. Groups with fewer than two valid samples don't count. The array is None in a run without a difficulty
      filter.
    best: the best evaluation. None before the first evaluation, or if `rl.keep_best` is empty.
    problems: SHA-256 of the problems of the source; '' if their number is unlimited.
    kept: SHA-256 of the problems that are left to training (`TaskSet.kept_sha256`).
    reward: SHA-256 of the file of the reward function (`TaskSet.reward_sha256`); '' if there is none.
  """

  prompts: int = 0
  zero_variance_N: np.ndarray | None = None
  best: Best | None = None
  problems: str = ''
  kept: str = ''
  reward: str = ''

  @classmethod
  def read(cls, cursor: Mapping[str, Any], tasks: TaskSet, filtered: bool) -> 'Progress':
    """Returns the progress in a checkpoint's cursor. The cursor {} gives the progress of a new run.

    filtered: whether the run has a difficulty filter.

    Raises:
      DataError: the problems, those of them that are left to training, or the file of the reward function aren't those
        that the cursor has recorded. Cursors from before 2026-11-28 have no hash of the problems that are left to
        training. If the run has a filter, their number is compared instead.
    """
    if (known := cursor.get('problems', '')) and known != tasks.sha256:
      raise DataError(f'{tasks.config.uri}: holds other problems than when the run began (sha256 {tasks.sha256[:12]}, '
                      f'not {known[:12]}); choose another workdir')
    if (known := cursor.get('reward', '')) and known != tasks.reward_sha256:
      raise DataError(f'{tasks.config.reward_file}: holds another reward function than when the run began (sha256 '
                      f'{tasks.reward_sha256[:12]}, not {known[:12]}); choose another workdir')
    before = cursor.get('zero_variance', {})
    if (cursor.get('kept', tasks.kept_sha256) != tasks.kept_sha256 or (
        filtered and before.get('tasks', tasks.size) != tasks.size)):
      raise DataError(f'{tasks.config.uri}: leaves other problems to training than when the run began, because other '
                      'problems are evaluated on or other references can be read; choose another workdir')
    zero_variance_N = np.zeros(tasks.size, bool) if filtered else None
    if filtered and before:
      bits = np.frombuffer(base64.b64decode(before['bits']), np.uint8)
      zero_variance_N = np.unpackbits(bits, count=tasks.size).astype(bool)
    best = Best(**cursor['best']) if 'best' in cursor else None
    return cls(cursor.get('prompts', 0), zero_variance_N, best, tasks.sha256, tasks.kept_sha256, tasks.reward_sha256)

  def cursor(self) -> dict[str, Any]:
    """Returns the progress as a dictionary that can be stored as JSON, and that `read` accepts.

    For the difficulty filter, the dictionary has one bit per task, which says whether the last group had zero variance.
    """
    found: dict[str, Any] = {
      'prompts': self.prompts, 'problems': self.problems, 'kept': self.kept, 'reward': self.reward}
    if self.zero_variance_N is not None:
      bits = base64.b64encode(np.packbits(self.zero_variance_N).tobytes()).decode()
      found['zero_variance'] = {'tasks': len(self.zero_variance_N), 'bits': bits}
    if self.best:
      found['best'] = dataclasses.asdict(self.best)
    return found

  def next_prompts(
    self, tasks: TaskSet, count: int, repeat: float, fits: Callable[[Task], bool] = lambda task: True
  ) -> 'tuple[dict[int, Task], Progress]':
    """Returns ({number: task} of the next `count` prompts, the progress after them).

    Prompts for which `fits` returns False are skipped. The difficulty filter also skips some prompts whose last group
    had zero variance.

    repeat: the probability, above 0, with which the difficulty filter lets such a prompt through. The decision depends
      only on the seed and the prompt's number.

    Raises:
      DataError: 10,000 prompts in a row don't fit.
    """
    found, number, missed = {}, self.prompts, 0
    while len(found) < count:
      if self._has_turn(tasks, number, repeat):
        task = tasks.at(number)
        missed = 0 if fits(task) else missed + 1
        if not missed:
          found[number] = task
        elif missed == _MOST_MISSED:
          raise DataError(f'{tasks.config.uri}: {missed} prompts in a row are longer than config.rl.max_prompt_tokens')
      number += 1
    return found, dataclasses.replace(self, prompts=number)

  def _has_turn(self, tasks: TaskSet, number: int, repeat: float) -> bool:
    """Returns False if the difficulty filter skips prompt number `number`, else True.

    The filter may skip a prompt only if the last group drawn for its task had zero variance. It keeps such a prompt
    with probability `repeat`, which a hash of the seed and the number decides.
    """
    if self.zero_variance_N is None or not self.zero_variance_N[tasks.index(number)]:
      return True
    digest = hashlib.blake2b(f'difficulty/{tasks.seed}/{number}'.encode(), digest_size=6).digest()
    return int.from_bytes(digest, 'big') < repeat * 2**48

  def recorded(self, tasks: TaskSet, drawn: Iterable[tuple[int, bool]]) -> 'Progress':
    """Returns the progress after groups were drawn, with the difficulty filter brought up to date.

    drawn: (the number of the prompt, whether the group has reward variance) of each group with two valid samples or
      more. Other groups don't show whether their problem is too easy or too hard, so they change nothing.
    """
    if self.zero_variance_N is None:
      return self
    zero_variance_N = self.zero_variance_N.copy()
    for number, varies in drawn:
      zero_variance_N[tasks.index(number)] = not varies
    return dataclasses.replace(self, zero_variance_N=zero_variance_N)

  def evaluated(self, new: Best) -> 'Progress':
    """Returns the progress after the evaluation `new`.

    It becomes the best one if there is none yet, if its value is larger than the best value so far, or if the best
    evaluation has another metric or other problems. If the value is NaN, the progress stays unchanged.
    """
    best = self.best
    same = best and best.metric == new.metric and best.problems in ('', new.problems)
    if math.isnan(new.value) or (same and new.value <= best.value):
      return self
    return dataclasses.replace(self, best=new)
