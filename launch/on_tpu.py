"""A sweep on TPU slices: which command of launch/tpu.sh runs a point, and what all of it will take.

Slice number i is TPU_NAME-i; it is created for the first point that needs it and stays for those after it.
"""

import json
import os
import pathlib
import subprocess
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from rich.console import Console
from rich.table import Table

from betarank import model
from betarank.configs.errors import ConfigError, UserError
from betarank.configs.load import to_json
from betarank.launch.plan.chips import Topology
from betarank.launch.plan.command import stage_seconds
from betarank.launch.points import BETARANK, TRAINS, Point
from betarank.rl.config import rl_run
from betarank.train.config import run_config

SCRIPT = pathlib.Path(__file__).with_name('tpu.sh')
NEEDED = ('TPU_NAME', 'TPU_PROJECT', 'TPU_ZONE', 'TPU_TYPE', 'TPU_RUNTIME')
ASSUMED_TYPE = 'v5litepod-256'  # in a dry run that names none
MFU_DENSE, MFU_MOE = 0.4, 0.1  # assumed where launch.plan isn't asked: model FLOPs over what the chips could do


def command(dry_run: bool) -> Callable[[Point, int], list[str]]:
  """command(point, slot) -> what runs the point on that slice. Raises ConfigError if a setting is missing."""
  missing = [name for name in NEEDED if not os.environ.get(name)]
  if not os.environ.get('TPU_MAX_HOURS') and not os.environ.get('TPU_MAX_DOLLARS'):
    missing.append('TPU_MAX_HOURS or TPU_MAX_DOLLARS, of each point,')
  if missing and not dry_run:
    raise ConfigError(f'--on=tpu: {missing[0]} is not set; launch/tpu.sh help says what it needs')
  name = os.environ.get('TPU_NAME', 'NAME')

  def run(point: Point, slot: int) -> list[str]:
    if point.stage == 'data':  # once, and from anywhere: not worth a slice
      return [*BETARANK, *point.arguments]
    return ['env', f'TPU_NAME={name}-{slot}', 'bash', str(SCRIPT), '--yes', 'babysit', *point.arguments]

  return run


def unreadable(points: Sequence[Point]) -> list[str]:
  """A line for each file of this machine, where no slice can read it, that points ask for once they run."""
  wanted: dict[str, list[str]] = {}
  for point in points:
    uris = [point.config.rl.task.uri] if point.stage == 'rl' else [
      uri for argument in point.arguments if argument.startswith('--benchmark=')
      for uri in argument.partition('=')[2].split(',')]
    for uri in uris:
      if uri.startswith('jsonl:') and '://' not in uri:
        wanted.setdefault(uri, []).append(point.name)
  return [f'{uri} is on this machine, where no slice can read it; copy it to the bucket and name it there '
          f'({names[0]}{f" and {len(names) - 1} more" if len(names) > 1 else ""})' for uri, names in wanted.items()]


def clean_up(console: Console, parallel: int) -> None:
  """Deletes the slices of a sweep that is through. One that can't be deleted is said to cost money."""
  for slot in range(parallel):
    name = f'{os.environ["TPU_NAME"]}-{slot}'
    done = subprocess.run(['bash', str(SCRIPT), '--yes', 'delete'], env={**os.environ, 'TPU_NAME': name},
                          capture_output=True, text=True)
    if done.returncode and 'NOT_FOUND' not in done.stderr and 'not found' not in done.stderr:
      console.print(f'error: {name} could not be deleted and may COST MONEY: {done.stderr.strip().splitlines()[-1:]}',
                    markup=False)


def topology() -> Topology:
  """The chips of one point's slices, TPU_TYPE and TPU_SLICES. Raises PlanError for pods that don't exist."""
  name = (os.environ.get('TPU_TYPE') or ASSUMED_TYPE).replace('v5litepod', 'v5e')
  return Topology(name, int(os.environ.get('TPU_SLICES') or 1))


def assumed_hours(point: Point, chips: Topology) -> tuple[float, float] | None:
  """(least, most) hours of a pre-training point at an assumed MFU; None for RL, which lasts as long as its answers."""
  if point.stage != 'train':
    return None
  run = run_config(point.config)
  mfu = MFU_MOE if run.model.moe.experts else MFU_DENSE
  flops = model.flops_per_token(run.model, run.data.sequence_length) * run.train.tokens
  return (flops / (chips.chips * chips.chip.flops * mfu) / 3600,) * 2


def planned_hours(point: Point, chips: Topology) -> tuple[float, float] | None:
  """(least, most) hours of a point that trains, from its programs compiled for these chips (launch/plan.py).

  Raises UserError if they don't fit.
  """
  if point.stage not in TRAINS:
    return None
  arguments = [a for a in point.arguments if a.startswith('--config')]
  done = subprocess.run(
    [*BETARANK, 'plan', *arguments, f'--topology={chips.name}', f'--slices={chips.slices}', '--json'],
    stdout=subprocess.PIPE, text=True)
  try:
    plans = json.loads(done.stdout)['plans']
  except ValueError:
    raise UserError(f'{point.name}: launch.plan ended with exit status {done.returncode}') from None
  for plan in plans:
    if not plan['fits']:
      raise UserError(f'{point.name}: {plan["program"]} does not fit {chips.name}: {plan["problem"]}')
  found = [SimpleNamespace(program=p['program'], prediction=SimpleNamespace(step_s=p['prediction']['step_s']))
           for p in plans]
  run = rl_run(point.config) if point.stage == 'rl' else run_config(point.config)
  low, high = stage_seconds(run, found)
  return low / 3600, high / 3600


def print_plan(console: Console, points: Sequence[Point], parallel: int, compile_first: bool) -> None:
  """Points, chips, hours and cost, before anything is rented."""
  chips = topology()
  estimate = planned_hours if compile_first else assumed_hours
  price = os.environ.get('TPU_DOLLARS_PER_HOUR')
  table = Table('point', 'tokens', 'chips', 'hours', 'chip hours', 'cost', box=None)
  for column in table.columns[1:]:
    column.justify = 'right'
  total, known = [0.0, 0.0], {}
  for point in points:
    if point.stage == 'data':
      table.add_row(point.name, '', 'this machine')
      continue
    same = _deciding(point)
    if same not in known:
      known[same] = estimate(point, chips)
    hours = known[same]
    tokens = f'{run_config(point.config).train.tokens / 1e9:,.3g}G' if point.stage == 'train' else ''
    if hours is None:
      table.add_row(point.name, tokens, str(chips.chips), '?', '?', '?')
      continue
    total = [t + h for t, h in zip(total, hours)]
    table.add_row(point.name, tokens, str(chips.chips), _span(hours), _span([h * chips.chips for h in hours]),
                  '$' + _span([h * float(price) for h in hours]) if price else '?')
  console.print(table)
  basis = (f'predicted by launch.plan from the programs compiled for {chips.name}; RL if every answer took its full '
           'length' if compile_first else
           f'at an assumed MFU of {MFU_DENSE:.0%} (dense) or {MFU_MOE:.0%} (MoE), RL not counted; --plan compiles the '
           'programs and predicts')
  console.print(f'in all {_span(total)} hours of {chips.slices} x {chips.name}, '
                f'{_span([t * chips.chips for t in total])} chip hours, '
                + (f'${_span([t * float(price) for t in total])}' if price else
                   'cost unknown: set TPU_DOLLARS_PER_HOUR, of all slices of a point')
                + f'; {_span([t / parallel for t in total])} hours from start to end with --parallel={parallel}, at '
                f'best.\nHours are {basis}. Input, evaluation, checkpoints and waiting for capacity come on top.',
                markup=False)
  if not os.environ.get('TPU_TYPE'):
    console.print(f'TPU_TYPE is not set: {ASSUMED_TYPE} is assumed', markup=False)
  for problem in unreadable(points):
    console.print(f'to be mended first: {problem}', markup=False)


def _deciding(point: Point) -> str:
  """Points that agree in this take equally long: not the seed, nor how far the objective goes, but for its top k."""
  config = json.loads(to_json(point.config))
  keep = ('model', 'rl', 'optimizer') + (('train', 'data') if point.stage in TRAINS else ('eval',))
  parts = {key: dict(config.get(key, {})) for key in keep}
  parts.get('train', {}).pop('init_from', None)
  top_k = any(value for name, value in config['objective'].items() if name.startswith('lambda_'))
  return json.dumps([point.stage, top_k, parts], sort_keys=True)


def _span(values: Sequence[float]) -> str:
  low, high = (f'{value:,.0f}' if value >= 100 else f'{value:,.3g}' for value in values)
  return low if low == high else f'{low} to {high}'
