"""Computes rewards from verdicts, and finds groups whose scores are all equal.

A sample's score is 1 if its answer is right and 0 if it is wrong, or what the user's own reward function returned. The
rules here add what its length is worth.
"""

import dataclasses
from collections.abc import Sequence

from betarank.tasks.verifiers import Verdict
from betarank.train.sampler import Sample


@dataclasses.dataclass(frozen=True)
class RewardRule:
  """The rule by which the length of an answer changes its reward.

  Attributes:
    truncated_reward: the treatment of a wrong answer that was cut off at the length limit: 'zero' for reward 0, or
      'masked' to leave the answer out of the loss (overlong filtering).
    longest: the length limit, in tokens.
    overlong_buffer: the last so many tokens before the limit cost a soft penalty; 0 for none.
  """

  truncated_reward: str
  longest: int
  overlong_buffer: int = 0

  def penalty(self, tokens: int) -> float:
    """Returns 0 down to -1, linearly over the buffer: the soft overlong punishment of DAPO, arXiv 2503.14476 eq. 13."""
    if not self.overlong_buffer:
      return 0.0
    return -min(max(tokens - (self.longest - self.overlong_buffer), 0) / self.overlong_buffer, 1.0)


def rewards(
  rule: RewardRule, scores: Sequence[float], verdicts: Sequence[Verdict], samples: Sequence[Sample]
) -> tuple[list[float], list[bool]]:
  """Returns (reward, whether it counts) of each sample. An undecided one never counts."""
  valid = [verdict != Verdict.UNDECIDED and (
    rule.truncated_reward == 'zero' or verdict == Verdict.RIGHT or sample.finish != 'length')
    for verdict, sample in zip(verdicts, samples)]
  values = [score + rule.penalty(len(sample.tokens)) if counts else 0.0
            for score, sample, counts in zip(scores, samples, valid)]
  return values, valid


def vary(rule: RewardRule, scores: Sequence[float], verdicts: Sequence[Verdict], samples: Sequence[Sample]) -> bool:
  """Returns whether the scores of a group's valid samples differ. Penalties for length don't count: a group that is
  right, or wrong, throughout is replaced by dynamic sampling whatever its lengths.
  """
  _, valid = rewards(rule, scores, verdicts, samples)
  return len({score for score, counts in zip(scores, valid) if counts}) > 1
