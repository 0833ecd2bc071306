"""Writes the report's text: the three sentences at its top, and the notes on its tables.

The first sentence says what is compared. The second says what the objective changed before RL, and the third says how
the arms differ on benchmarks after RL. A change is stated only between runs that agree in everything except the
objective. With a single seed, no arm is called better.
"""

import math
import re
from collections.abc import Iterable, Sequence

from betarank.eval.report.agreement import of_steps
from betarank.eval.report.comparisons import Comparison, pairs
from betarank.eval.report.metrics import change, metric
from betarank.eval.report.page import Html, join, tag
from betarank.eval.report.runs import Run, Sweep

BEFORE_METRICS = ('entropy_nats', 'ce_nats')  # the metrics of the second sentence
NAMED = 2  # the third sentence names at most so many differences

BY_SEED = ('Mean over seeds with Student\'s 95 % interval; beneath it the difference Δ to the baseline, seed by seed '
           'on the same tokens.')
DYNAMICS_NOTE = ('Means over the first and the last tenth of the RL steps, over seeds, and their change; beneath it '
                 'the difference Δ to the baseline, seed by seed.')
BENCHMARK_NOTE = ('95 % intervals over problems and seeds; beneath it the difference Δ to the baseline on the same '
                  'problems and seeds.')
GAIN_NOTE = 'After RL, and beneath it the difference Δ to the checkpoint that RL started from, on the same problems.'
CLAIMS_NOTE = ('The claims of arXiv 2512.22955, with the tests of docs/study.md. Effects are paired by seed, and for '
               'samples by problem; p-values are corrected for all tests of a claim that decide. It holds if all tests '
               'with a verdict say yes, and fails if one says no, or if all effects are too small to matter. '
               '"Detectable" is the effect that would be found about four times in five (a little less often with '
               'few seeds), before correction.')
HARNESS_NOTE = ('Scores of lm-evaluation-harness: mean over seeds with Student\'s 95 % interval; beneath it the '
                'difference Δ to the baseline, seed by seed.')

HOW_TO_READ = join([tag('p', line) for line in (
  'A difference is stated only between runs with the same seed that agree in everything but the objective: tokenizer, '
  'prepared data (by hash), settings, step, and so the tokens seen. Otherwise the page says in what they disagree.',
  'One seed gives no verdict. An interval of a single seed holds the noise of problems only: another seed, or another '
  'order of floating-point additions, can turn the sign around.',
  'Intervals over problems are studentised bootstrap intervals, for shares on the arcsine scale; several seeds add '
  'Student\'s t, so that two or three seeds give wide intervals. The p-value belongs to the interval. A '
  'figure with one value per run that is exactly the same in all seeds doesn\'t show how much seeds differ, and has '
  'neither, except that a difference of zero in all seeds has p = 1.',
  '▲ and ▼ mark a difference beyond noise: its p-value, after Holm\'s correction over all arms and subjects of '
  'that stage and metric, is at most 0.05. "Within noise" means that no difference was shown, not that there is none; '
  'the smallest difference that would have been detected about four times in five (a little less often with few seeds) '
  'is in tables/*.csv (smallest_detectable).',
  'Avg@n is the share of right samples. Cons@n asks whether the most frequent answer is right; ties count with their '
  'expectation. Pass@k is the chance that k samples hold a right one, unbiased from all n. A sample that the verifier '
  'could not decide is left out of all of them; a sample without an answer is wrong and has no vote.',
  'Tail mass is the probability outside the model\'s own top k tokens, without the true token.',
)])


def first_screen(
  sweep: Sweep, distributions: Sequence[Comparison], benchmarks: Sequence[Comparison]
) -> list[Html]:
  """Returns the sentences at the top of the page, one paragraph for each.

  distributions: the result of comparisons.distributions.
  benchmarks: the result of comparisons.benchmarks.
  """
  if not sweep.arms:
    return [tag('p', 'There is no run here with a known objective, so nothing can be compared yet.')]
  if len(sweep.arms) == 1:
    return [tag('p', f'There is one arm only, {sweep.arms[0]}, so there is nothing to compare it with.')]
  before, after = stages_around_rl(sweep)
  sentences = [_compared(sweep)]
  if before:
    sentences.append(_before_rl([c for c in distributions if c.stage == before]))
  if after:
    sentences.append(_after_rl([c for c in benchmarks if c.stage == after and _of_right_answers(c)]))
  else:
    sentences.append('No run has been through RL yet.')
  return [tag('p', sentence) for sentence in sentences if sentence]


def stages_around_rl(sweep: Sweep) -> tuple[str, str]:
  """Returns (the last stage without RL, the last stage with RL), such as ('pre-training', 'pre-training → RL').

  A stage that doesn't exist is ''.
  """
  with_rl = [stage for stage in sweep.stages if 'RL' in stage]
  without = [stage for stage in sweep.stages if 'RL' not in stage]
  return (without[-1] if without else ''), (with_rl[-1] if with_rl else '')


def _compared(sweep: Sweep) -> str:
  """Returns the first sentence at the top of the page.

  It lists the arms that differ only in the objective, with the numbers of seeds for which that is so. For every other
  arm, and for other seeds, it says why they aren't compared. Arms that another version of the code trained are
  compared, but named, because the version doesn't say whether it matters.
  """
  together: dict[str, list[str]] = {}  # baseline -> the arms that are compared with it
  counts: dict[str, list[int]] = {}  # baseline -> how many seeds are compared, for each arm and stage
  code: dict[str, list[str]] = {}  # baseline -> which arms were trained by another version of the code
  wrong = []
  for arm in (arm for arm in sweep.arms if arm != sweep.baselines[arm]):
    baseline, partly = sweep.baselines[arm], False
    there = [stage for stage in sweep.stages if sweep.of(stage, arm)]
    for stage in there:
      agreeing, reasons = _agreeing(sweep, stage, arm)
      if not agreeing or (reasons and not partly):
        who = f'some seeds of {arm} are' if agreeing else f'{arm} is'
        where = f' in {stage}' if stage != there[0] else ''
        wrong.append(f'{who} not compared with {baseline}{where}: {reasons[0]}')
      if not agreeing:
        break
      partly = partly or bool(reasons)
      counts.setdefault(baseline, []).append(len(agreeing))
      code.setdefault(baseline, []).extend(
        f'{arm} ({run.code_version} against {other.code_version})' for run, other in agreeing
        if run.code_version and other.code_version and run.code_version != other.code_version)
      if stage == there[0]:
        together.setdefault(baseline, []).append(arm)
  said = [f'{_and([baseline, *arms])} saw the same data for the same steps, with {_seeds(counts[baseline])} each, and '
          f'differ only in the objective{_in_code(code[baseline])}'
          for baseline, arms in together.items()]
  return '; '.join([*said, *wrong]) + ('.' if said else '; so no change is put down to an objective.')


def _in_code(arms: Sequence[str]) -> str:
  return f', and in the code for {_and_unique(arms)}' if arms else ''


def _seeds(counts: Sequence[int]) -> str:
  least, most = min(counts), max(counts)
  return f'{least} to {most} seeds' if least < most else f'{most} seed{"s" * (most > 1)}'


def _agreeing(sweep: Sweep, stage: str, arm: str) -> tuple[list[tuple[Run, Run]], list[str]]:
  """Returns (pairs of runs that differ only in the objective, reasons why other pairs of the same seed don't count).

  The runs of a pair, one of the arm and one of its baseline, have the same seed, the same data, the same settings
  (except the objective) and the same last step.
  """
  agreeing, reasons = pairs(sweep, stage, arm)
  steps = [of_steps(run, run.last_step, other, other.last_step) for run, other in agreeing]
  return ([pair for pair, differing in zip(agreeing, steps) if not differing],
          [*reasons, *(reason for differing in steps for reason in differing)])


def _before_rl(found: Sequence[Comparison]) -> str:
  compared = [c for c in found if c.difference is not None]
  if not compared:
    return 'Before RL, no figure of two arms can be compared yet.'
  compared = [c for c in compared if c.metric in BEFORE_METRICS]
  against, judged = _and_unique(c.baseline for c in compared), _judged(compared)
  subjects: dict[str, list[str]] = {}  # what is said, and of which subjects
  for subject, name in short(c.subject for c in compared).items():
    said = _changes([c for c in compared if c.subject == subject], judged)
    subjects.setdefault(said, []).append(name)
  said = '; '.join(f'on {_and(names)}, {what}' for what, names in subjects.items())
  said = f'Before RL, relative to {against}: {said}'
  return f'{said}.' if judged else f'{said}; this is one seed per arm, and what another would give is not known.'


def _changes(found: Sequence[Comparison], judged: bool) -> str:
  """Returns a clause that says how arms differ from their baseline on one subject, such as a data source.

  found: the comparisons on this subject.
  judged: whether the comparisons have verdicts. If they do, only differences larger than noise are named.
  """
  clauses = []
  for name in BEFORE_METRICS:
    of_metric = [c for c in found if c.metric == name]
    differing = [c for c in of_metric if not judged or c.verdict == 'beyond']
    for word, sign in (('lower', -1), ('higher', 1)):
      if some := [c for c in differing if c.difference.mean * sign > 0]:
        clauses.append(f'{metric(name).title} is {word} for {_and([_with_change(c) for c in some])}')
    if of_metric and not differing:
      unknown = [c.arm for c in of_metric if not c.verdict]
      clauses.append(f'{metric(name).title} differs for no arm beyond noise'
                     + (f' (no verdict on {_and(unknown)})' if unknown else ''))
  return _and(clauses) or 'nothing differs'


def _after_rl(found: Sequence[Comparison]) -> str:
  compared = [c for c in found if c.difference is not None]
  if not compared:
    return ('After RL, nothing can be compared yet: no two arms that agree have samples on one benchmark (betarank '
            'eval sample).')
  against, names = _and_unique(c.baseline for c in compared), short(c.subject for c in compared)
  if not _judged(compared):
    first = [c for c in compared if (c.metric, c.subject) == (compared[0].metric, compared[0].subject)]
    figures = _and([f'{_of(c)} for {c.arm}' for c in first])
    return ('After RL, with one seed per arm, no arm can be called better: on '
            f'{names[first[0].subject]}, relative to {against}, there are {figures}, and these '
            'intervals hold the noise of problems only, not that of seeds.')
  groups: dict[tuple[str, str, bool], list[Comparison]] = {}
  for c in sorted((c for c in compared if c.verdict == 'beyond'), key=lambda c: (c.p_holm, -abs(c.difference.mean))):
    groups.setdefault((c.arm, c.subject, c.difference.mean > 0), []).append(c)
  if not groups:
    return (f'After RL, no arm differs from {against} beyond the noise of problems and seeds in '
            f'{_and_unique(metric(c.metric).title for c in compared)}{_detectable(compared)}.')
  said = []
  for (arm, subject, better), some in list(groups.items())[:NAMED]:
    figures = _and([_of(c) for c in some])
    said.append(f'{arm} is {"better" if better else "worse"} than {some[0].baseline} on {names[subject]} ({figures})')
  more = len(groups) - NAMED
  rest = f'{more} more difference{"s are" if more > 1 else " is"} in the tables' if more > 0 else (
    'no other difference is beyond noise')
  return f'After RL, {_and(said)}; {rest}.'


def short(subjects: Iterable[str]) -> dict[str, str]:
  """Returns short names of data sources or benchmarks: {subject: name}.

  The options of a URI are left out: 'reasoning:gcd?max_value=9+products?max_digits=1' becomes 'reasoning:gcd+products'.
  If two subjects would then have the same name, they keep their whole names.
  """
  names = {subject: re.sub(r'\?[^+]*', '', subject) for subject in subjects}
  return {subject: name if list(names.values()).count(name) == 1 else subject for subject, name in names.items()}


def _with_change(c: Comparison) -> str:
  return f'{c.arm} ({change(c.metric, c.difference)})'


def _of(c: Comparison) -> str:
  """Returns a difference and the name of its metric, such as '+1.2 points [−0.3, +2.7] of right answers'."""
  what = {'avg_at_n': 'of right answers', 'cons_at_n': 'by majority vote'}
  return f'{change(c.metric, c.difference)} {what.get(c.metric, f"in {metric(c.metric).title}")}'


def _of_right_answers(c: Comparison) -> bool:
  return c.metric in ('avg_at_n', 'cons_at_n') or c.metric.startswith('pass_at_')


def _judged(comparisons: Iterable[Comparison]) -> bool:
  """Returns whether any difference has several seeds, without which there are no verdicts."""
  return any(c.difference.seeds > 1 for c in comparisons)


def _detectable(comparisons: Sequence[Comparison]) -> str:
  smallest = sorted(x for c in comparisons if math.isfinite(x := c.difference.smallest_detectable))
  if not smallest:
    return ''
  return (f'; differences of about {100 * smallest[len(smallest) // 2]:.1f} points would have been detected (about '
          '80 % power, a little less with few seeds; before correction)')


def _and(parts: Sequence[str]) -> str:
  return ' and '.join(filter(None, (', '.join(parts[:-1]), *parts[-1:])))


def _and_unique(parts: Iterable[str]) -> str:
  return _and(list(dict.fromkeys(parts)))
