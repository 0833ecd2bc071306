"""Makes the table of docs/plans.md: memory, time and tokens per day of pre-training the models of configs/paper."""

import fnmatch
import pathlib
from collections.abc import Callable, Iterator

from betarank.configs import load
from betarank.configs.errors import ConfigError
from betarank.launch.plan.chips import Topology
from betarank.launch.plan.plans import GB, Plan, make_plans
from betarank.launch.plan.workload import Workload, workload

MODELS = {'dense_1b': '1B', 'dense_4b': '4B', 'moe_5b_a0p3b': '5B-A0.3B', 'moe_10b_a0p5b': '10B-A0.5B',
          'moe_20b_a1b': '20B-A1B'}  # file in configs/paper -> name in the table
PODS = ('v5e-256', 'v5p-256', 'v6e-256')
HEAD = ('| model, pod | mesh, remat | temporary GB | peak GB | step, s | MFU | billions of tokens per day | hours |\n'
        '|---|---|---|---|---|---|---|---|')


def choose(pattern: str) -> list[tuple[str, str]]:
  """Returns (model, pod) for each row of the table whose name, such as dense_4b/v5e-256, matches a shell pattern.

  Raises:
    ConfigError: no name matches.
  """
  names = [(model, pod) for model in MODELS for pod in PODS]
  found = [(model, pod) for model, pod in names if fnmatch.fnmatchcase(f'{model}/{pod}', pattern)]
  if not found:
    raise ConfigError(f'--table={pattern}: matches no row; there are {", ".join("/".join(name) for name in names)}')
  return found


def lines(rows: list[tuple[str, str]], folder: pathlib.Path, say: Callable[[str], None]) -> Iterator[str]:
  """Yields the lines of the table, each after its program was compiled.

  Args:
    rows: as returned by `choose`.
    folder: where libtpu writes bundles. All files in it are deleted.
    say: prints a line about progress.
  """
  yield HEAD
  for model, pod in rows:
    work, topology = workload(load.load(f'configs/paper/{model}.py')), Topology(pod)
    [plan] = make_plans(work, topology, topology.devices(), folder, say)
    yield row(MODELS[model], work, plan)


def row(name: str, work: Workload, plan: Plan) -> str:
  """Returns the line of one model and pod. Each prediction begins with the slower case, such as '2.10 to 1.90' seconds.

  The columns of times are empty if libtpu wrote no bundles, because times are predicted from them.

  name: the name of the model.
  """
  mesh = ' x '.join(f'{axis} {n}' for axis, n in plan.mesh.items())
  start = f'| {name}, {plan.topology} | {mesh}, {plan.remat_policy} |'
  if not plan.fits:
    return f'{start} does not fit: {plan.problem} | | | | | |'
  start = f'{start} {plan.temp_bytes / GB:.2f} | {plan.peak_bytes / GB:.2f} of {plan.hbm_bytes / GB:.2f} |'
  if plan.prediction.unread:  # compiled with --no_bundles
    return f'{start} | | | |'
  low, high = plan.prediction.step_s
  per_day = [plan.tokens / step_s * 86_400 / 1e9 for step_s in (high, low)]
  hours = [work.steps * step_s / 3600 for step_s in (high, low)]
  return (f'{start} {high:.2f} to {low:.2f} | {100 * plan.mfu[0]:.0f} to {100 * plan.mfu[1]:.0f} % | '
          f'{per_day[0]:.0f} to {per_day[1]:.0f} | {hours[0]:.0f} to {hours[1]:.0f} |')
