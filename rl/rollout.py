"""Samples and judges groups of answers.

# P prompts  G samples per prompt
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from betarank.data import DataError, Tokenizer
from betarank.rl.rewards import RewardRule, rewards, vary
from betarank.runtime import multihost
from betarank.tasks.task_set import Task, TaskSet
from betarank.tasks.verifiers import Verdict, Verifier
from betarank.train.sampler import Prompt, Sample, Sampler

_NOT_MINE = min(Verdict) - 1  # placeholder for the verdicts that other processes compute


class Group(NamedTuple):
  """The samples of one prompt, with their verdicts."""

  cursor: int  # the number of the prompt in the run
  task: Task
  prompt: list[int]  # tokens, BOS first
  samples: list[Sample]
  texts: list[str]
  verdicts: list[Verdict]
  scores: list[float]  # 1 if right else 0, or the result of the user's reward function; NaN if undecided

  def rewards(self, rule: RewardRule) -> tuple[list[float], list[bool]]:
    """Returns two lists: the reward of each sample, and whether the sample counts. See rl/rewards.py."""
    return rewards(rule, self.scores, self.verdicts, self.samples)

  def has_reward_variance(self, rule: RewardRule) -> bool:
    """Returns whether the scores of the valid samples differ.

    If all are equal, most advantage functions give all samples of the group the advantage 0.
    """
    return vary(rule, self.scores, self.verdicts, self.samples)


def graded_groups(
  sampler: Sampler, params, verifier: Verifier, tokenizer: Tokenizer, asked: Mapping[int, Task], *, samples: int,
  seed: int, step: int
) -> list[Group]:
  """Samples and judges the answers to prompts. Returns one group per prompt, in the order of `asked`.

  Groups are judged while the device draws the next ones. With several processes, all of them draw the samples together.
  Each process judges a share of the groups, and then all processes exchange their verdicts. The result is a pure
  function of the arguments, except for verdicts that stay undecided because of a deadline.

  Args:
    asked: {number of the prompt: task}. The number selects the random numbers, together with `seed` and `step`.
    samples: the group size.

  Raises:
    DataError: a prompt is too long for the sampler.
  """
  prompts = [Prompt(number, prompt_tokens(tokenizer, task)) for number, task in asked.items()]
  for prompt in prompts:
    if len(prompt.tokens) > sampler.s.max_prompt_tokens:
      raise DataError(f'{asked[prompt.id].id}: its prompt has {len(prompt.tokens)} tokens, more than '
                      f'config.rl.max_prompt_tokens = {sampler.s.max_prompt_tokens}; config.rl.long_prompts=skip '
                      'leaves such prompts out')
  drawn_P, row = {}, {number: i for i, number in enumerate(asked)}
  verdict_PG = np.full((len(prompts), samples), _NOT_MINE, np.int32)
  score_PG = np.full((len(prompts), samples), -np.inf, np.float32)
  for n, drawn in enumerate(sampler(params, prompts, samples=samples, seed=seed, step=step)):
    i = row[drawn[0].prompt_id]
    texts = [tokenizer.decode(sample.text_tokens) for sample in drawn]
    drawn_P[i] = (drawn, texts)
    if n % jax.process_count() == jax.process_index():
      grades = verifier.grade([(text, asked[prompts[i].id]) for text in texts])
      verdict_PG[i] = [grade.verdict for grade in grades]
      score_PG[i] = [grade.reward for grade in grades]
  verdict_PG = multihost.max_over_processes(verdict_PG)
  score_PG = multihost.max_over_processes(np.nan_to_num(score_PG, neginf=-np.inf))
  score_PG = np.where(verdict_PG == Verdict.UNDECIDED, np.nan, score_PG)
  return [Group(prompt.id, asked[prompt.id], prompt.tokens, *drawn_P[i], [Verdict(v) for v in verdict_PG[i]],
                score_PG[i].tolist())
          for i, prompt in enumerate(prompts)]


def prompt_tokens(tokenizer: Tokenizer, task: Task) -> list[int]:
  """Returns the tokens that the model continues: BOS, then the task's prompt."""
  return [tokenizer.bos, *tokenizer.encode(task.prompt).tolist()]


def check_prompts(tokenizer: Tokenizer, tasks: TaskSet, longest: int) -> str:
  """Returns '' if every prompt fits in `longest` tokens; otherwise a sentence that says how many prompts are longer.

  The prompts of a set of unlimited size aren't checked, and the result is ''.
  """
  if tasks.size is None:
    return ''
  lengths = [len(prompt_tokens(tokenizer, tasks[i])) for i in range(tasks.size)]
  long = sum(n > longest for n in lengths)
  return f'{long} of {len(lengths)} prompts have more than {longest} tokens, the longest {max(lengths)}' if long else ''
