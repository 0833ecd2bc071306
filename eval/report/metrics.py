"""Defines the titles, units and formats of the report's metrics."""

import dataclasses
import math

from betarank.eval import paper
from betarank.eval.statistics import Estimate


@dataclasses.dataclass(frozen=True)
class Metric:
  """Describes how a metric is shown, with its title, its number format and its unit.

  Attributes:
    title: the title, without unit.
    form: the format specification of values and differences, such as '.3f'. They are first multiplied by `factor`.
    unit: the unit of values; '' if there is none.
    factor: the factor that converts a value to its unit, such as 100 for '%'.
    change_unit: the unit of differences; '' if it is the same as `unit`.
  """

  title: str
  form: str
  unit: str = ''
  factor: float = 1.0
  change_unit: str = ''


_PERCENT = dict(unit='%', factor=100.0, change_unit='points')
_METRICS = {
  'ce_nats': Metric('cross-entropy', '.4f', 'nats'),
  'bits_per_byte': Metric('bits per byte', '.4f'),
  'perplexity': Metric('perplexity', '.3f'),
  'entropy_nats': Metric('entropy', '.4f', 'nats'),
  'entropy_top20_nats': Metric('entropy of the top 20 %', '.3f', 'nats'),
  'head_mass': Metric('head mass', '.5f'),
  'tail_mass': Metric('tail mass', '.5f'),
  'top_gap_nats': Metric('top-1 to top-2 gap', '.3f', 'nats'),
  'ece': Metric('calibration error (ECE)', '.4f'),
  'rank1_accuracy': Metric('rank-1 accuracy', '.2f', **_PERCENT),
  'pass_rate': Metric('pass rate', '.1f', **_PERCENT),
  'length_tokens': Metric('length', '.1f', 'tokens'),
  'truncated_share': Metric('truncated', '.1f', **_PERCENT),
  'avg_at_n': Metric('Avg@n', '.1f', **_PERCENT),
  'cons_at_n': Metric('Cons@n', '.1f', **_PERCENT),
  'distinct_answers': Metric('distinct answers', '.2f'),
  'answer_entropy_nats': Metric('answer entropy', '.3f', 'nats'),
  'score': Metric('score', '.1f', **_PERCENT),
  **{name: Metric(name, '.2f', **_PERCENT) for name in (*paper.BENCHMARKS, *paper.CATEGORIES, *paper.AVERAGES)},
}


def metric(name: str) -> Metric:
  """Returns how the metric `name` is shown. An unknown metric gets a default format.

  name: the name of a metric, which may be 'pass_at_K' with any number K.
  """
  if name.startswith('pass_at_'):
    return Metric(f'Pass@{name.removeprefix("pass_at_")}', '.1f', **_PERCENT)
  return _METRICS.get(name, Metric(name.replace('_', ' '), '.4g'))


def title(name: str) -> str:
  """Returns a metric's title with its unit, such as 'Avg@n (%)'."""
  found = metric(name)
  start = found.title[:1].upper() + found.title[1:]
  return f'{start} ({found.unit})' if found.unit else start


def shown(name: str, value: float) -> str:
  """Returns a value as text, converted to the metric's unit. The text doesn't include the unit, which is in the row's
  title.

  name: the name of the metric.
  value: the value before conversion.
  """
  found = metric(name)
  return _minus(f'{found.factor * value:{found.form}}')


def shown_change(name: str, value: float, *, unit: bool = False) -> str:
  """Returns a difference as text, such as '+1.2'. If `unit` is True, the text includes the unit: '+1.2 points'."""
  found = metric(name)
  change_unit = found.change_unit or found.unit
  return _minus(f'{found.factor * value:+{found.form}}') + (f' {change_unit}' if unit and change_unit else '')


def interval(name: str, e: Estimate) -> str:
  """Returns the interval of a difference as text, such as '[−0.3, +2.7]'; '' if it isn't finite."""
  if not (math.isfinite(e.low) and math.isfinite(e.high)):
    return ''
  return f'[{shown_change(name, e.low)}, {shown_change(name, e.high)}]'


def change(name: str, e: Estimate) -> str:
  """Returns a difference and its interval as text, such as '+1.2 points [−0.3, +2.7]'."""
  return f'{shown_change(name, e.mean, unit=True)} {interval(name, e)}'.strip()


def _minus(text: str) -> str:
  return text.replace('-', '−')
