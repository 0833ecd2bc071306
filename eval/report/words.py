"""The report's words: names and units of figures, and the sentences at its top, made from the comparisons."""

import dataclasses
import math
from collections.abc import Sequence

from betarank.eval.report.comparisons import Comparison, is_share
from betarank.eval.report.page import Html, join, tag
from betarank.eval.report.runs import Sweep
from betarank.eval.statistics import Estimate


@dataclasses.dataclass(frozen=True)
class Metric:
  title: str
  form: str  # of the value
  unit: str = ''
  factor: float = 1.0
  change_unit: str = ''  # of a difference, if another


PERCENT = dict(unit=' %', factor=100.0, change_unit=' points')
METRICS = {
  'ce_nats': Metric('cross-entropy', '.4f', ' nats'),
  'bits_per_byte': Metric('bits per byte', '.4f'),
  'perplexity': Metric('perplexity', '.3f'),
  'entropy_nats': Metric('entropy', '.4f', ' nats'),
  'entropy_top20_nats': Metric('entropy of the top 20 %', '.3f', ' nats'),
  'tail_mass': Metric('tail mass', '.5f'),
  'top_gap_nats': Metric('top-1 to top-2 gap', '.3f', ' nats'),
  'ece': Metric('calibration error (ECE)', '.4f'),
  'rank1_accuracy': Metric('rank-1 accuracy', '.2f', **PERCENT),
  'pass_rate': Metric('pass rate', '.1f', **PERCENT),
  'length_tokens': Metric('length', '.1f', ' tokens'),
  'truncated_share': Metric('truncated', '.1f', **PERCENT),
  'avg_at_n': Metric('Avg@n', '.1f', **PERCENT),
  'cons_at_n': Metric('Cons@n', '.1f', **PERCENT),
  'distinct_answers': Metric('distinct answers', '.2f'),
  'answer_entropy_nats': Metric('answer entropy', '.3f', ' nats'),
}
_PASS = Metric('Pass@k', '.1f', **PERCENT)

BY_SEED = ('Mean over seeds with Student\'s 95 % interval; beneath it the difference to the first arm, seed by seed on '
           'the same tokens.')
DYNAMICS_NOTE = ('Means over the first and the last tenth of the RL steps, over seeds, and their change; beneath, the '
                 'difference to the first arm, seed by seed.')
BENCHMARK_NOTE = ('95 % intervals over problems and seeds; beneath, the difference to the first arm on the same '
                  'problems and seeds. Arms within noise of each other are not ranked.')
GAIN_NOTE = ('After RL, and beneath it the difference to the checkpoint that RL started from, on the same problems.')

HOW_TO_READ = join([tag('p', line) for line in (
  'Intervals over problems are studentised bootstrap intervals; several seeds add a second level with Student\'s t, so '
  'that two or three seeds give wide intervals, as they must. The p-value is the one that belongs to the interval.',
  '▲ and ▼ mark a difference beyond noise: its p-value, after Holm\'s correction over all arms and subjects of '
  'that stage and metric, is at most 0.05. "Within noise" means that no difference was shown, not that there is none; '
  'the smallest difference that would have been seen four times in five is in tables/*.csv (smallest_detectable).',
  'Avg@n is the share of right samples. Cons@n asks whether the most frequent answer is right, ties counted with their '
  'expectation. Pass@k is the chance that k samples hold a right one, unbiased from all n. A sample that the verifier '
  'could not decide is left out of all of them; a sample without an answer is wrong and has no vote.',
  'Tail mass is the probability outside the model\'s own top k tokens, the ground truth apart.',
)])


def metric(name: str) -> Metric:
  return METRICS.get(name, _PASS if name.startswith('pass_at_') else Metric(name.replace('_', ' '), '.4g'))


def title(name: str, k: int) -> str:
  found = metric(name)
  shown_title = f'Pass@{k}' if name.startswith('pass_at_') else found.title[:1].upper() + found.title[1:]
  unit = found.unit.strip()
  return f'{shown_title} ({unit})' if unit else shown_title


def shown(name: str, value: float, *, unit: bool = False) -> str:
  """A value as it stands in a cell; the unit is in the column's title."""
  found = metric(name)
  return f'{found.factor * value:{found.form}}{found.unit if unit else ""}'.replace('-', '−')


def shown_change(name: str, value: float, *, unit: bool = False) -> str:
  """'+1.2 points'"""
  found = metric(name)
  return f'{found.factor * value:+{found.form}}{(found.change_unit or found.unit) if unit else ""}'.replace('-', '−')


def interval(name: str, e: Estimate) -> str:
  """'[−0.3, +2.7]', or '' where there is none."""
  if not (math.isfinite(e.low) and math.isfinite(e.high)):
    return ''
  return f'[{shown_change(name, e.low)}, {shown_change(name, e.high)}]'


def _change(c: Comparison) -> str:
  """'+1.2 points [−0.3, +2.7]'"""
  return f'{shown_change(c.metric, c.difference.mean, unit=True)} {interval(c.metric, c.difference)}'.strip()


def answer(
  sweep: Sweep, distributions: Sequence[Comparison], dynamics: Sequence[Comparison], benchmarks: Sequence[Comparison],
  k: int,
) -> list[Html]:
  """What the objective did to the distribution, what RL made of it, and whether either is beyond noise: paragraphs."""
  if not sweep.arms:
    return [tag('p', 'There is no run here with a known objective, so there is nothing to compare yet.')]
  said = [('', [f'There is one arm only, {sweep.arms[0]}: nothing to compare it with'])] if len(sweep.arms) == 1 else []
  said += [_of_distribution(sweep, distributions), _of_rl(sweep, benchmarks, k), _of_dynamics(sweep, dynamics)]
  return [_paragraph(*sentence) for sentence in said if sentence[1]]


def _paragraph(lead: str, clauses: Sequence[str]) -> Html:
  """A sentence; of more than two clauses a list, which reads better on a phone."""
  if len(clauses) > 2:
    return join([tag('p', lead), tag('ul', *(tag('li', clause) for clause in clauses))])
  return tag('p', f'{lead} {"; ".join(clauses)}.'.strip())


def _of_distribution(sweep: Sweep, found: Sequence[Comparison]) -> tuple[str, list[str]]:
  """Of the first stage that compares anything, on its first domain."""
  compared = [c for c in found if c.difference is not None]
  if not compared:
    return '', []
  stage, subject = compared[0].stage, compared[0].subject
  here = {(c.arm, c.metric): c for c in compared if (c.stage, c.subject) == (stage, subject)}
  clauses = []
  for arm in sweep.arms[1:]:
    shown_here = [c for name in ('entropy_nats', 'tail_mass', 'ce_nats') if (c := here.get((arm, name)))]
    alike = len({c.verdict for c in shown_here}) == 1
    parts = [f'{metric(c.metric).title} by {_change(c)}'
             + ('' if alike else f' ({_NOISE[c.verdict]})') for c in shown_here]
    if parts:
      clauses.append(f'{arm} changed {_and(parts)}'
                     + (f' ({"all " if len(parts) > 1 else ""}{_NOISE[shown_here[0].verdict]})' if alike else ''))
  return f'{stage[:1].upper()}{stage[1:]}, against {sweep.arms[0]} on {subject}:', clauses


_NOISE = {'beyond': 'beyond noise', 'within': 'within noise', '': 'of unknown noise: one seed'}


def _of_rl(sweep: Sweep, benchmarks: Sequence[Comparison], k: int) -> tuple[str, list[str]]:
  after = [c for c in benchmarks if 'RL' in c.stage and is_share(c.metric) and c.metric != 'truncated_share']
  compared = [c for c in after if c.difference is not None]
  names = {'avg_at_n': 'Avg@n', 'cons_at_n': 'Cons@n', f'pass_at_{k}': f'Pass@{k}'}
  if not compared:
    if any('RL' in stage for stage in sweep.stages):
      return '', ['What RL made of it can\'t be said from samples yet: no two arms have comparable samples after RL '
                  '(betarank eval sample)']
    return '', ['There is no RL run here yet, so nothing can be said on what RL makes of it']
  beyond = [c for c in compared if c.verdict == 'beyond']
  smallest = sorted(x for c in compared if math.isfinite(x := c.difference.smallest_detectable))
  middle = f'{100 * smallest[len(smallest) // 2]:.1f}' if smallest else '?'
  power = f'; differences of about {middle} points could have been seen (80 % power, without correction)'
  caveat = '; with one seed an arm, the noise of seeds is not in this' if all(
    c.difference.seeds == 1 for c in compared) else ''
  count = f'{len(compared)} comparisons with {sweep.arms[0]} ({_and(list(names.values()))})'
  if not beyond:
    return '', [f'After RL, none of {count} is beyond noise, so the arms are not ranked{power}{caveat}']
  said = [f'{c.arm} {names[c.metric]} on {c.subject} {_change(c)}' for c in
          sorted(beyond, key=lambda c: c.p_holm)[:4]]
  more = [f'and {len(beyond) - 4} more, in the tables below'] if len(beyond) > 4 else []
  verb = 'is' if len(beyond) == 1 else 'are'
  return f'After RL, {len(beyond)} of {count} {verb} beyond noise{power}{caveat}:', said + more


def _of_dynamics(sweep: Sweep, dynamics: Sequence[Comparison]) -> tuple[str, list[str]]:
  """Where each arm's entropy and length went during RL."""
  if not dynamics:
    return '', []
  stage = dynamics[-1].stage
  value = {(c.subject, c.metric, c.arm): c.value.mean for c in dynamics if c.stage == stage and c.value}
  clauses = []
  for arm in sweep.arms:
    moves = [f'{name} {shown(key, value["start", key, arm])} to {shown(key, value["end", key, arm], unit=True)}'
             for key, name in (('pass_rate', 'pass rate'), ('entropy_nats', 'entropy'), ('length_tokens', 'length'))
             if ('start', key, arm) in value]
    if moves:
      clauses.append(f'{arm}: {_and(moves)}')
  return 'From the first to the last tenth of the RL steps,', clauses


def _and(parts: list[str]) -> str:
  return parts[0] if len(parts) == 1 else f'{", ".join(parts[:-1])} and {parts[-1]}'
