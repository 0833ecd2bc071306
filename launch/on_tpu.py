"""Runs a sweep on TPU slices: returns the launch/tpu.sh command of a point, and estimates what the sweep costs.

Slice number i is named TPU_NAME-i. It is created for the first point that needs it, and used again for later points.
"""

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from betarank import model
from betarank.configs.errors import ConfigError, UserError
from betarank.configs.load import to_json
from betarank.configs.parser import above_zero
from betarank.launch.plan import chips as tpus
from betarank.launch.plan.chips import Topology
from betarank.launch.plan.workload import workload
from betarank.launch.points import BETARANK, TRAINS, Point
from betarank.train.config import run_config

SCRIPT = pathlib.Path(__file__).with_name('tpu.sh')
REQUIRED = ('TPU_NAME', 'TPU_PROJECT', 'TPU_ZONE', 'TPU_TYPE', 'TPU_RUNTIME')
DEFAULT_TYPE = 'v5litepod-256'  # used by a dry run if TPU_TYPE isn't set
DELETE_TRIES, DELETE_WAIT_S = 3, 10.0
CALL_LIMIT_S = 600  # for one call of launch/tpu.sh; a call of gcloud may hang
# (slow end, fast end) of the MFU that an estimate without --plan assumes: {(chip, mixture of experts): ...}. From
# docs/plans.md: on v5e the 4B and the 10B-A0.5B at the paper's batch, on v6e the 1B. Earlier plans of the 4B on v5p
# were within a point of those on v5e.
PLANNED_MFU = {('v5e', False): (0.52, 0.63), ('v5e', True): (0.26, 0.29), ('v5p', False): (0.52, 0.63),
               ('v6e', False): (0.33, 0.34)}
# The same for RL: ((slow, fast) of the update, (slow, fast) of sampling). From docs/plans.md: the 4B and the 10B-A0.5B
# on v5e-256, with a cache of 13 million tokens and of 6.6 million. With 13 million, the 10B reads twice the keys and
# values of its 6.6 million, which took 8 of 28.2 ms.
PLANNED_RL_MFU = {('v5e', False): ((0.54, 0.60), (0.046, 0.076)), ('v5e', True): ((0.36, 0.37), (0.034, 0.044))}


def command(dry_run: bool) -> Callable[[Point, int], list[str]]:
  """Returns a function (point, slot) -> command. The command, a list of words, runs the point on slice number `slot`.

  A point that prepares data runs on this machine instead.

  dry_run: whether to skip all checks of the environment.

  Raises:
    ConfigError: a setting is missing, or launch/tpu.sh couldn't start a run.
  """
  missing = [name for name in REQUIRED if not os.environ.get(name)]
  if not os.environ.get('TPU_MAX_HOURS') and not os.environ.get('TPU_MAX_DOLLARS'):
    missing.append('TPU_MAX_HOURS or TPU_MAX_DOLLARS, of each point,')
  if missing and not dry_run:
    raise ConfigError(f'--on=tpu: {missing[0]} is not set; launch/tpu.sh help lists the settings')
  if not dry_run:
    checked = _tpu_sh(slice_of(0), 'check')
    if checked.returncode:
      raise ConfigError(f'--on=tpu: {_last_line(checked.stderr).removeprefix("tpu.sh: error: ")}')

  def run(point: Point, slot: int) -> list[str]:
    if point.stage == 'data':  # runs once and on any machine, so it doesn't need a slice
      return [*BETARANK, *point.arguments]
    return ['env', f'TPU_NAME={slice_of(slot)["TPU_NAME"]}', 'bash', str(SCRIPT), '--yes', 'babysit', *point.arguments]

  return run


def slice_of(slot: int) -> dict[str, str]:
  """Returns the environment variables with which launch/tpu.sh finds slice number `slot`, as {name: value}.

  A sweep records them, so that a later launch with other settings can still delete the slice. Settings that mean the
  same give the same values: TPU_SLICES is 1 by default, and more than one slice is always queued.
  """
  get = os.environ.get
  slices = get('TPU_SLICES') or '1'
  return {'TPU_NAME': f'{get("TPU_NAME", "NAME")}-{slot}', 'TPU_PROJECT': get('TPU_PROJECT', ''),
          'TPU_ZONE': get('TPU_ZONE', ''), 'TPU_QUEUED': '1' if get('TPU_QUEUED') or slices != '1' else '',
          'TPU_SLICES': slices}


def clean_up(console: Console, slices: Sequence[dict[str, str]], others: Sequence[dict[str, str]],
             keep: bool) -> list[dict[str, str]]:
  """Deletes slices. Then prints a line that names the slices that still cost money, and returns those not deleted.

  Args:
    slices: the slices, as `slice_of` returns them.
    others: slices that run other commands, and that aren't deleted therefore. A line names them.
    keep: if True, no slice is deleted, because the sweep was asked to stop and the next launch will use the slices.
  """
  if keep:
    left = [it for it in slices if _tpu_sh(it, 'state').stdout.strip() != 'NONE']
  else:
    left = [it for it in slices if not _delete(console, it)]
  names = ', '.join(it['TPU_NAME'] for it in left)
  commands = '; '.join(shlex.join([*(f'{name}={value}' for name, value in it.items() if value), 'bash', str(SCRIPT),
                                   '--yes', 'delete']) for it in left)
  if others:
    console.print('not deleted, because another command runs there, and still billed: '
                  + ', '.join(it['TPU_NAME'] for it in others), markup=False)
  if left:
    console.print(f'STILL BILLED until deleted: {names}. To delete: {commands}', markup=False)
  elif others:
    console.print('no other slice of this sweep is left: nothing else is billed')
  else:
    console.print('no slice of this sweep is left: nothing is billed')
  return list(slices) if keep else left  # one that isn't there may still come, if its creation was interrupted


def _delete(console: Console, slice_: dict[str, str]) -> bool:
  """Deletes a slice, with up to three tries. Returns whether it is deleted, and prints an error if it isn't."""
  for attempt in range(DELETE_TRIES):
    if attempt:
      time.sleep(DELETE_WAIT_S)
    done = _tpu_sh(slice_, '--yes', 'delete')  # succeeds if the slice doesn't exist
    if not done.returncode:
      return True
  console.print(f'error: {slice_["TPU_NAME"]} could not be deleted: {_last_line(done.stderr)}', markup=False)
  return False


def start_delete(slice_: dict[str, str]) -> subprocess.Popen:
  """Starts to delete a slice, and returns the process, which continues if this process ends."""
  return subprocess.Popen(_command('--yes', 'delete'), env={**os.environ, **slice_}, stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def _tpu_sh(slice_: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(_command(*arguments), env={**os.environ, **slice_}, capture_output=True, text=True)


def _command(*arguments: str) -> list[str]:
  return ['timeout', '--kill-after=30', str(CALL_LIMIT_S), 'bash', str(SCRIPT), *arguments]


def _last_line(text: str) -> str:
  return (text.strip().splitlines() or [''])[-1]


def topology() -> Topology:
  """Returns the topology on which a point runs. Reads the type of its pods from the environment variable TPU_TYPE, and
  the number of pods from TPU_SLICES.

  Raises:
    PlanError: there is no such pod.
    ConfigError: TPU_SLICES isn't a number of pods.
  """
  return tpus.topology(os.environ.get('TPU_TYPE') or DEFAULT_TYPE, _number('TPU_SLICES', int) or 1)


def _number(name: str, kind: type[float]) -> float | None:
  """Returns the number in an environment variable; None if the variable isn't set or is empty.

  kind: as for `above_zero`.

  Raises:
    ConfigError: the value isn't a number above 0.
  """
  text = os.environ.get(name)
  try:
    return above_zero(kind)(text) if text else None
  except argparse.ArgumentTypeError as error:
    raise ConfigError(f'{name}: {error}') from None


def assumed_hours(point: Point, chips: Topology) -> tuple[float, float] | None:
  """Returns the (least, most) hours of a training point, if it reaches the MFU that was planned for similar models.

  In RL, every answer is assumed to have the maximum length. The real time is shorter.

  Returns None if the point doesn't train, or if PLANNED_MFU (for RL, PLANNED_RL_MFU) has no entry for such a model.
  """
  if point.stage not in TRAINS:
    return None
  work = workload(point.config)
  key = chips.chip.name, bool(work.run.model.moe.experts)
  if work.rl:
    drawn, updated = work.rl_tokens()
    tokens = updated, drawn / 3  # of the FLOPs of an update, sampling has only the forward pass
    planned = PLANNED_RL_MFU.get(key)
  else:
    tokens = (work.run.train.tokens,)
    planned = (PLANNED_MFU[key],) if key in PLANNED_MFU else None
  if planned is None:
    return None
  second = chips.chips * chips.chip.flops / model.flops_per_token(work.run.model, work.length)  # tokens at the peak
  slow, fast = (sum(n / (second * mfu[end]) for n, mfu in zip(tokens, planned)) / 3600 for end in (0, 1))
  return fast, slow


def planned_hours(point: Point, chips: Topology) -> tuple[float, float] | None:
  """Returns the (least, most) hours that `betarank plan` predicts for a training point, after compiling its programs.

  The programs are compiled with the libtpu flags in TPU_ENV. Returns None for a point that doesn't train.

  Raises:
    UserError: the point doesn't fit on these chips.
  """
  if point.stage not in TRAINS:
    return None
  settings = [argument for argument in point.arguments if argument.startswith('--config')]
  done = subprocess.run(
    [*BETARANK, 'plan', *settings, f'--topology={chips.name}', f'--slices={chips.slices}', '--json'],
    stdout=subprocess.PIPE, text=True, env={**os.environ, **worker_flags()})
  try:
    found = json.loads(done.stdout)
  except ValueError:
    raise UserError(f'{point.name}: betarank plan ended with exit status {done.returncode}') from None
  for plan in found['plans']:
    if not plan['fits']:
      raise UserError(f'{point.name}: {plan["program"]} does not fit {chips.name}: {plan["problem"]}')
  low, high = found['stage']['seconds']
  return low / 3600, high / 3600


def worker_flags() -> dict[str, str]:
  """Returns {'LIBTPU_INIT_ARGS': value} if TPU_ENV sets this variable, otherwise {}.

  `betarank plan` needs the variable, because it changes the compiled programs.

  Raises:
    ConfigError: TPU_ENV has a quote without an end.
  """
  try:
    words = shlex.split(os.environ.get('TPU_ENV', ''))
  except ValueError:
    raise ConfigError(f'TPU_ENV has a quote without an end: {os.environ["TPU_ENV"]}') from None
  variables = dict(word.partition('=')[::2] for word in words)
  return {name: value for name, value in variables.items() if name == 'LIBTPU_INIT_ARGS'}


def print_estimate(console: Console, points: Sequence[Point], parallel: int, compile_first: bool) -> None:
  """Prints chips, hours and cost of each point and of the whole sweep.

  parallel: the number of points that run at the same time.
  compile_first: if True, hours come from `planned_hours`; if False, from `assumed_hours`, which compiles nothing.

  Raises:
    UserError: a point doesn't fit on the chips, or an environment variable can't be used.
  """
  chips = topology()
  estimate = planned_hours if compile_first else assumed_hours
  price = _number('TPU_DOLLARS_PER_HOUR', float)
  table = Table('point', 'tokens', 'chips', 'hours', 'chip hours', 'cost', box=None)
  for column in table.columns[1:]:
    column.justify = 'right'
  total, known = [0.0, 0.0], {}
  for point in points:
    if point.stage == 'data':
      table.add_row(point.name, '', 'this machine')
      continue
    key = program_key(point)
    if key not in known:
      known[key] = estimate(point, chips)
    hours = known[key]
    tokens = f'{run_config(point.config).train.tokens / 1e9:,.3g}G' if point.stage == 'train' else ''
    if hours is None:
      table.add_row(point.name, tokens, str(chips.chips), '?', '?', '?')
      continue
    total = [t + h for t, h in zip(total, hours)]
    table.add_row(point.name, tokens, str(chips.chips), _span(hours), _span([h * chips.chips for h in hours]),
                  '$' + _span([h * price for h in hours]) if price else '?')
  console.print(table)
  basis = (f'predicted by betarank plan from the programs compiled for {chips.name}; for RL, if every answer has its '
           'full length' if compile_first else
           'for the MFU that docs/plans.md predicts for such models, without what has a ?, and for RL if every answer '
           'has its full length; --plan compiles the programs and predicts')
  console.print(f'in all {_span(total)} hours of {chips.slices} x {chips.name}, '
                f'{_span([t * chips.chips for t in total])} chip hours, '
                + (f'${_span([t * price for t in total])}' if price else
                   'cost unknown: set TPU_DOLLARS_PER_HOUR, the price of all slices of a point')
                + f'; at best {_span([t / parallel for t in total])} hours from start to end with '
                f'--parallel={parallel}.\nHours are {basis}. Input, evaluation, checkpoints and waiting for capacity '
                'are not included.', markup=False)
  if any(point.stage == 'data' for point in points):
    console.print('The hours of preparing data are printed by its command with --dry_run.')
  if not os.environ.get('TPU_TYPE'):
    console.print(f'TPU_TYPE is not set: {DEFAULT_TYPE} is assumed', markup=False)


def program_key(point: Point) -> str:
  """Returns a text that is equal for points with the same compiled programs. Such points take the same time.

  The text contains neither the seed nor the values of the objective. It says only whether any lambda is nonzero,
  because the loss then searches for the most probable tokens.
  """
  config = json.loads(to_json(point.config))
  keep = ('model', 'rl', 'optimizer') + (('train', 'data') if point.stage in TRAINS else ('eval',))
  parts = {key: dict(config.get(key, {})) for key in keep}
  parts.get('train', {}).pop('init_from', None)
  top_k = any(value for name, value in config.get('objective', {}).items() if name.startswith('lambda_'))
  return json.dumps([point.stage, top_k, parts], sort_keys=True)


def _span(values: Sequence[float]) -> str:
  low, high = (f'{value:,.0f}' if value >= 100 else f'{value:,.3g}' for value in values)
  return low if low == high else f'{low} to {high}'
