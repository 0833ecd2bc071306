"""Decides which warnings a running RL job prints. All functions are pure, and take the logged figures.

For a finished run, the report looks for similar signs of trouble (eval/report/oddities.py).
"""

from collections.abc import Iterable, Mapping, Sequence

QUIET_STEPS = 10  # warn after so many steps without a group to learn from
FIRST_STEPS = 5  # the entropy at the start is a mean over so many steps
TRUNCATED_STEPS = 10  # warn after so many steps in which nearly all answers were cut off
FLAT_STEPS = 100  # warn if the pass rate hasn't changed over so many steps
COLLAPSED = 0.1  # warn if the entropy of drawn tokens falls below this share of its first values

# Lines of steps have these figures; those of runs before 2026-11-28 may lack some, and are left out.
_NEEDED = {'train/groups_learned_from', 'train/tokens', 'train/length_tokens', 'train/entropy_drawn_nats'}


def needed(lines: Iterable[Mapping[str, float]]) -> list[Mapping[str, float]]:
  """Returns the lines of a run's metrics.jsonl that `warnings` needs: those of the first and the last steps."""
  steps = [line for line in lines if line.keys() >= _NEEDED]
  return steps[:FIRST_STEPS] + steps[FIRST_STEPS:][-FLAT_STEPS:]


def warnings(history: Sequence[Mapping[str, float]], why_undecided: str = '') -> dict[str, str]:
  """Returns the warnings as {kind: text}. Each text is one line.

  history: the figures of each step, as rl/loop.py logs them, oldest first. Lines that `needed` leaves out change
    nothing.
  why_undecided: the reason of the first undecided verdict, if it is known.
  """
  found = {}
  last = lambda steps: history[-steps:] if len(history) >= steps else []
  recent = lambda name, steps: [line[name] for line in last(steps) if name in line]
  undecided = sum(recent('train/undecided', QUIET_STEPS))
  answers = sum(line['train/tokens'] / line['train/length_tokens'] for line in last(QUIET_STEPS))
  if undecided > answers / 2:
    found['undecided'] = (f'{100 * undecided / answers:.0f} % of the answers of {QUIET_STEPS} steps are undecided, and '
                          f'nothing is learned from them{why_undecided and f"; the first reason was: {why_undecided}"}')
  elif (learned := recent('train/groups_learned_from', QUIET_STEPS)) and not any(learned):
    found['no signal'] = (f'no group could be learned from for {QUIET_STEPS} steps: the problems are too hard or '
                          'too easy for this model, or its answers are not in the expected format')
  if (shares := recent('train/truncated_share', TRUNCATED_STEPS)) and min(shares) > 0.95:
    found['truncated'] = (f'over 95 % of answers were cut off for {TRUNCATED_STEPS} steps: config.rl.max_new_tokens '
                          'is too small, or the model does not end its answers')
  if len(rates := recent('train/pass_rate', FLAT_STEPS)) >= FLAT_STEPS / 2:  # steps without decided answers have none
    half = len(rates) // 2
    if abs(_mean(rates[half:]) - _mean(rates[:half])) < 0.005:
      found['flat'] = f'the pass rate has not moved for {FLAT_STEPS} steps ({_mean(rates):.3f})'
  if len(history) >= 20:
    entropies = [line['train/entropy_drawn_nats'] for line in history]
    first, now = _mean(entropies[:FIRST_STEPS]), _mean(entropies[-FIRST_STEPS:])
    if now < COLLAPSED * first:
      found['collapse'] = (f'entropy fell from {first:.3f} to {now:.3f} nats: the samples of a prompt are nearly all '
                           'the same')
  return found


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values)
