"""What an RL run carries from step to step besides its parameters; a checkpoint holds it as the run's cursor.

It decides which prompts come next (the difficulty filter) and which checkpoint is kept as the best. Both are pure
functions of the seed and of what has been recorded so far, so a resumed run does as an uninterrupted one.
"""

import base64
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from betarank.tasks.task_set import TaskSet


@dataclasses.dataclass(frozen=True)
class Best:
  """The evaluation with the highest figure so far, the earliest if several have it. step: 0 is the policy at the start.
  """

  metric: str  # as it is logged: eval/held_out/avg_at_16
  step: int
  value: float


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far a run is.

  Attributes:
    prompts: prompts consumed so far, with those that the difficulty filter passed over.
    zero_variance_N: bool, for each task of the set: the last group drawn for it had zero variance. None without filter.
    best: None without an evaluation, or if no checkpoint is to be kept for one.
  """

  prompts: int = 0
  zero_variance_N: np.ndarray | None = None
  best: Best | None = None

  @classmethod
  def read(cls, cursor: Mapping[str, Any], tasks: int) -> 'Progress':
    """Returns the progress that a checkpoint's cursor holds; {} is that of a fresh run.

    tasks: the size of the task set, 0 without filter. What was recorded for a set of another size is dropped.
    """
    zero_variance_N = np.zeros(tasks, bool) if tasks else None
    before = cursor.get('zero_variance', {})
    if tasks and before.get('tasks') == tasks:
      bits = np.frombuffer(base64.b64decode(before['bits']), np.uint8)
      zero_variance_N = np.unpackbits(bits, count=tasks).astype(bool)
    best = Best(**cursor['best']) if 'best' in cursor else None
    return cls(cursor.get('prompts', 0), zero_variance_N, best)

  def cursor(self) -> dict[str, Any]:
    """Returns the JSON-serializable form that `read` takes. The filter needs one bit per task."""
    found: dict[str, Any] = {'prompts': self.prompts}
    if self.zero_variance_N is not None:
      bits = base64.b64encode(np.packbits(self.zero_variance_N).tobytes()).decode()
      found['zero_variance'] = {'tasks': len(self.zero_variance_N), 'bits': bits}
    if self.best:
      found['best'] = dataclasses.asdict(self.best)
    return found

  def next_prompts(self, tasks: TaskSet, count: int, repeat: float, seed: int) -> 'tuple[list[int], Progress]':
    """Returns the numbers of the next `count` prompts to ask, and the progress after them.

    A prompt whose last group had zero variance is asked in a share `repeat` > 0 of its turns, and passed over in the
    others.
    """
    if self.zero_variance_N is None:
      after = self.prompts + count
      return list(range(self.prompts, after)), dataclasses.replace(self, prompts=after)
    found, number = [], self.prompts
    while len(found) < count:
      if not self.zero_variance_N[tasks.index(number)] or _uniform(seed, number) < repeat:
        found.append(number)
      number += 1
    return found, dataclasses.replace(self, prompts=number)

  def recorded(self, tasks: TaskSet, drawn: Iterable[tuple[int, bool]]) -> 'Progress':
    """Returns the progress after some groups. drawn: (number of the prompt, whether its rewards vary) of each."""
    if self.zero_variance_N is None:
      return self
    zero_variance_N = self.zero_variance_N.copy()
    for number, varies in drawn:
      zero_variance_N[tasks.index(number)] = not varies
    return dataclasses.replace(self, zero_variance_N=zero_variance_N)

  def evaluated(self, metric: str, step: int, value: float) -> 'Progress':
    """Returns the progress after an evaluation. One by another metric than before begins a new comparison."""
    if self.best and self.best.metric == metric and not value > self.best.value:
      return self
    return dataclasses.replace(self, best=Best(metric, step, value))


def _uniform(seed: int, number: int) -> float:
  """Returns a number in [0, 1) that depends on the arguments alone."""
  return int.from_bytes(hashlib.blake2b(f'difficulty/{seed}/{number}'.encode(), digest_size=6).digest(), 'big') / 2**48
