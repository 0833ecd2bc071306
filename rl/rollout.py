"""Samples and judges groups of answers.

# P prompts  G samples per prompt
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from betarank.configs.errors import ConfigError
from betarank.data import DataError, Tokenizer
from betarank.rl.advantages import AdvantageConfig, advantages
from betarank.rl.rewards import RewardRule, rewards, vary
from betarank.runtime import multihost
from betarank.tasks.task_set import Task
from betarank.tasks.verifiers import Grade, Verdict, Verifier
from betarank.train.sampler import Prompt, Sample, Sampler


class Group(NamedTuple):
  """The samples of one prompt, and their verdicts.

  Attributes:
    cursor: the prompt's index, from 0, among all prompts of the run.
    task: the problem.
    prompt: the tokens of the prompt, BOS first.
    samples, texts, verdicts: the samples, the text of each sample, and the verdict on each sample.
    scores: for each sample, 1 if it is right and 0 if it is wrong, or the result of the user's reward function. NaN if
      the verdict is undecided.
  """

  cursor: int
  task: Task
  prompt: list[int]
  samples: list[Sample]
  texts: list[str]
  verdicts: list[Verdict]
  scores: list[float]

  def rewards(self, rule: RewardRule) -> tuple[list[float], list[bool]]:
    """Returns (rewards, valid): each sample's reward, and whether the update uses the sample. See rl/rewards.py."""
    return rewards(rule, self.scores, self.verdicts, self.samples)

  def advantages(self, rule: RewardRule, c: AdvantageConfig) -> np.ndarray:
    """Returns the advantage of each sample, float32 [G]. If all are 0, nothing is learned from the group."""
    values, valid = self.rewards(rule)
    return advantages(c, [values], [valid])[0]

  def has_reward_variance(self, rule: RewardRule, c: AdvantageConfig) -> bool:
    """Returns True if the rewards differ as the advantage function `c` sees them.

    They must differ by more than their length penalties (see `vary`), and an advantage must differ from 0. For
    `pass_at_k`, a group with fewer than k wrong answers has no variance, because any k answers include a right one.
    """
    return vary(rule, self.scores, self.verdicts, self.samples) and bool(self.advantages(rule, c).any())


def graded_groups(
  sampler: Sampler, params, verifier: Verifier, tokenizer: Tokenizer, asked: Mapping[int, Task], *, samples: int,
  seed: int, step: int, more: Callable[[Sequence[Group]], Mapping[int, Task] | None] | None = None
) -> list[Group]:
  """Samples answers to prompts and judges them. Returns the groups, ordered by the number of the prompt.

  Groups are judged while the device draws the next groups. With several processes, all of them draw the samples
  together. Each process judges a share of the groups, and then all processes exchange their verdicts. The result is a
  pure function of the arguments, except for verdicts that are undecided because of a deadline.

  Args:
    asked: {number of the prompt: task}. The number, `seed` and `step` together select the random numbers.
    samples: the group size.
    more: a function that gets the groups judged since its last call, and returns further prompts in the form of
      `asked`. It is called while answers are still being drawn, whenever groups have been judged, and with the same
      groups in all processes. If it returns None, sampling ends, and groups that aren't complete are missing from the
      result.

  Raises:
    DataError: a prompt is too long for the sampler.
  """
  tasks, found = {}, {}
  drawn: list[tuple[int, list[Sample], list[str], list[Grade] | None]] = []  # not yet exchanged

  def prompts(asked):
    tasks.update(asked)
    return [_prompt(sampler, tokenizer, number, task) for number, task in asked.items()]

  def exchange():
    grade_2PG = np.full((2, len(drawn), samples), -np.inf, np.float32)
    for p, (_, _, _, grades) in enumerate(drawn):
      if grades:
        grade_2PG[:, p] = np.nan_to_num([[g.verdict for g in grades], [g.reward for g in grades]])
    verdict_PG, score_PG = multihost.max_over_processes(grade_2PG)
    score_PG = np.where(verdict_PG == Verdict.UNDECIDED, np.nan, score_PG)
    for (number, group, texts, _), verdict_G, score_G in zip(drawn, verdict_PG, score_PG):
      found[number] = Group(number, tasks[number], prompt_tokens(tokenizer, tasks[number]), group, texts,
                            [Verdict(int(v)) for v in verdict_G], score_G.tolist())
    judged = [found[number] for number, *_ in drawn]
    drawn.clear()
    return judged

  def further():
    if not drawn:
      return []
    asked = more(exchange())
    return None if asked is None else prompts(asked)

  first = prompts(asked)
  for n, group in enumerate(sampler(
      params, first, samples=samples, seed=seed, step=step, more=further if more else None)):
    number = group[0].prompt_id
    texts = [tokenizer.decode(sample.text_tokens) for sample in group]
    mine = n % jax.process_count() == jax.process_index()
    grades = verifier.grade([(text, tasks[number]) for text in texts]) if mine else None
    drawn.append((number, group, texts, grades))
  if drawn:
    exchange()
  return [found[number] for number in sorted(found)]


def _prompt(sampler: Sampler, tokenizer: Tokenizer, number: int, task: Task) -> Prompt:
  prompt = Prompt(number, prompt_tokens(tokenizer, task))
  if len(prompt.tokens) > sampler.s.max_prompt_tokens:
    raise DataError(f'{task.id}: its prompt has {len(prompt.tokens)} tokens, more than config.rl.max_prompt_tokens = '
                    f'{sampler.s.max_prompt_tokens}; config.rl.long_prompts=skip leaves such prompts out')
  return prompt


def prompt_tokens(tokenizer: Tokenizer, task: Task) -> list[int]:
  """Returns the tokens that the model continues: BOS, then the task's prompt."""
  return [tokenizer.bos, *tokenizer.encode(task.prompt).tolist()]


def check_prompts(tokenizer: Tokenizer, tasks: Iterable[Task], longest: int, skip: bool, name: str = '') -> str:
  """Returns a sentence that says how many prompts have more than `longest` tokens, or '' if no prompt has.

  skip: whether such prompts are left out (config.rl.long_prompts).
  name: the name of the evaluation set; '' for the prompts to train on.

  Raises:
    ConfigError: a prompt is too long and isn't to be left out, or all prompts are too long.
  """
  lengths = [len(prompt_tokens(tokenizer, task)) for task in tasks]
  long = sum(n > longest for n in lengths)
  if not long:
    return ''
  found = (f'{long} of {len(lengths)} prompts{name and f" of {name}"} have more than {longest} tokens, the longest '
           f'{max(lengths)}')
  if long == len(lengths):
    raise ConfigError(f'config.rl.max_prompt_tokens: {found}; raise it')
  if not skip:
    raise ConfigError(f'config.rl.max_prompt_tokens: {found}; raise it, or leave them out with '
                      '--config.rl.long_prompts=skip')
  return found
