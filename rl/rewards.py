"""Computes the rewards of samples, and finds groups whose scores are all equal.

The score of a sample is 1 for a right answer and 0 for a wrong one, or the result of the user's reward function. The
reward is the score after the rules for the answer's length.
"""

import dataclasses
from collections.abc import Sequence

from betarank.tasks.verifiers import Verdict
from betarank.train.sampler import Sample


@dataclasses.dataclass(frozen=True)
class RewardRule:
  """The rule that changes the reward of an answer because of its length.

  Attributes:
    truncated_reward: what happens to an answer that was cut off at the length limit and isn't right. 'zero' gives it
      the score 0, or its own if that is lower, as with a user's reward function; 'masked' leaves it out of the loss
      (overlong filtering).
    longest: the length limit, in tokens.
    overlong_buffer: the number of tokens over which the reward falls gradually, up to the limit; 0 for no penalty.
  """

  truncated_reward: str
  longest: int
  overlong_buffer: int = 0

  def penalty(self, tokens: int) -> float:
    """Returns the penalty for an answer of this length.

    The penalty is 0 up to `longest - overlong_buffer` tokens, then falls linearly, and is -1 at `longest` tokens.
    Source: the soft overlong punishment of DAPO, arXiv 2503.14476 eq. 13.
    """
    if not self.overlong_buffer:
      return 0.0
    return -min(max(tokens - (self.longest - self.overlong_buffer), 0) / self.overlong_buffer, 1.0)


def rewards(
  rule: RewardRule, scores: Sequence[float], verdicts: Sequence[Verdict], samples: Sequence[Sample]
) -> tuple[list[float], list[bool]]:
  """Returns (rewards, valid): the reward of each sample, and whether the update uses the sample.

  The update never uses samples with an undecided verdict. If truncated_reward is 'masked', it doesn't use wrong answers
  that were cut off either. The reward of an unused sample is 0.
  """
  lost = [verdict == Verdict.WRONG and sample.finish == 'length' for verdict, sample in zip(verdicts, samples)]
  valid = [verdict != Verdict.UNDECIDED and not (cut_off and rule.truncated_reward == 'masked')
           for verdict, cut_off in zip(verdicts, lost)]
  values = [(min(score, 0.0) if cut_off else score) + rule.penalty(len(sample.tokens)) if counts else 0.0
            for score, sample, cut_off, counts in zip(scores, samples, lost, valid)]
  return values, valid


def vary(rule: RewardRule, scores: Sequence[float], verdicts: Sequence[Verdict], samples: Sequence[Sample]) -> bool:
  """Returns True if the rewards of a group's valid samples (see `rewards`) differ by more than their length penalties.

  A group whose answers are all right, or all wrong, is therefore replaced in dynamic sampling even if the answers
  differ in length.
  """
  values, valid = rewards(dataclasses.replace(rule, overlong_buffer=0), scores, verdicts, samples)
  return len({value for value, counts in zip(values, valid) if counts}) > 1
