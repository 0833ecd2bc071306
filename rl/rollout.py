"""Samples and judges groups of answers, and packs groups into the arrays that an update takes.

# P prompts  G samples per prompt  B = P·G rows  T tokens  L layers  k experts per token
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from betarank.data import Batch, DataError, Tokenizer
from betarank.rl.rewards import RewardRule, rewards, vary
from betarank.runtime import multihost
from betarank.tasks.task_set import Task, TaskSet
from betarank.tasks.verifiers import Verdict, Verifier
from betarank.train.sampler import Prompt, Sample, Sampler

_NOT_MINE = min(Verdict) - 1  # placeholder for the verdicts that other processes compute


class Group(NamedTuple):
  """The samples of one prompt, and their verdicts.

  Attributes:
    cursor: the number of the prompt in the run.
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
    """Returns (rewards, valid): the reward of each sample, and whether the sample counts. See rl/rewards.py."""
    return rewards(rule, self.scores, self.verdicts, self.samples)

  def has_reward_variance(self, rule: RewardRule) -> bool:
    """Returns whether the scores of the valid samples differ.

    If they don't, most advantage functions give all samples of the group the advantage 0.
    """
    return vary(rule, self.scores, self.verdicts, self.samples)


def graded_groups(
  sampler: Sampler, params, verifier: Verifier, tokenizer: Tokenizer, asked: Mapping[int, Task], *, samples: int,
  seed: int, step: int
) -> list[Group]:
  """Samples answers to prompts and judges them. Returns one group per prompt, in the order of `asked`.

  Groups are judged while the device draws the next groups. With several processes, all of them draw the samples
  together. Each process judges a share of the groups, and then all processes exchange their verdicts. The result is a
  pure function of the arguments, except for verdicts that are undecided because of a deadline.

  Args:
    asked: {number of the prompt: task}. The number, `seed` and `step` together select the random numbers.
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
  """Returns a sentence that says how many prompts have more than `longest` tokens, or '' if no prompt has.

  The prompts of an unlimited set aren't checked, and the result is ''.
  """
  if tasks.size is None:
    return ''
  lengths = [len(prompt_tokens(tokenizer, tasks[i])) for i in range(tasks.size)]
  long = sum(n > longest for n in lengths)
  return f'{long} of {len(lengths)} prompts have more than {longest} tokens, the longest {max(lengths)}' if long else ''


@dataclasses.dataclass(frozen=True)
class Rollouts:
  """The arrays of one step. Rows of the same group are adjacent.

  If dynamic sampling has found fewer groups than wanted, the remaining rows are empty.
  """

  batch: Batch
  completion_BT: np.ndarray  # bool: True where the target is a sampled token
  sampler_logp_BT: np.ndarray  # float32, nats; 0 where the target isn't a sampled token
  rewards_PG: np.ndarray  # float32
  valid_PG: np.ndarray  # bool
  choices_BTLk: np.ndarray | None = None  # int16: the experts that the sampler used for each token, if recorded


def pack(groups: list[Group], *, prompts: int, samples: int, length: int, rule: RewardRule) -> Rollouts:
  """Writes the prompt and completion of each sample into a row of `length` (input, target) pairs.

  prompts, samples: P and G of the result. If there are fewer groups than P, the last rows stay empty.
  """
  rows = prompts * samples
  tokens, targets, positions, segments = (np.zeros((rows, length), np.int32) for _ in range(4))
  completion, logp = np.zeros((rows, length), bool), np.zeros((rows, length), np.float32)
  rewards, valid = np.zeros((prompts, samples), np.float32), np.zeros((prompts, samples), bool)
  recorded = next((sample.choices for group in groups for sample in group.samples), None)
  choices = None if recorded is None else np.zeros((rows, length, *recorded.shape[1:]), np.int16)
  for p, group in enumerate(groups):
    rewards[p], valid[p] = group.rewards(rule)
    for g, sample in enumerate(group.samples):
      row, start = p * samples + g, len(group.prompt) - 1
      whole = np.concatenate([group.prompt, sample.tokens])
      n = len(whole) - 1
      tokens[row, :n], targets[row, :n], positions[row, :n], segments[row, :n] = whole[:-1], whole[1:], np.arange(n), 1
      completion[row, start:n], logp[row, start:n] = True, sample.logp
      if choices is not None:
        choices[row, :n] = sample.choices
  return Rollouts(Batch(tokens, targets, positions, segments), completion, logp, rewards, valid, choices)


def lengths(groups: list[Group]) -> Iterator[int]:
  """Yields the number of (input, target) pairs of each sample."""
  return (len(group.prompt) + len(sample.tokens) - 1 for group in groups for sample in group.samples)
