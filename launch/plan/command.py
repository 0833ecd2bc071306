"""betarank plan --config=FILE[:ARG] --topology=v5e-256 [--search] [--json] [--config.KEY=VALUE ...]

Compiles what a config would run for a TPU pod that isn't here, and says whether it fits, how long a step would take and
what the stage would cost. The programs are training's own; nothing is allocated, and neither data nor tokenizer is
needed. A compile takes minutes. Pods go by their usual names: v5e-256 and v6e-256 have 256 chips, v5p-128 has 64.

Memory is what the compiler laid out. Time is predicted from the compiled program (launch/predict.py says how), as an
interval.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from betarank.configs import load, settings

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Plan:
  """One program on one topology. Bytes are a chip's, seconds those of one execution; times are (least, most)."""

  program: str
  topology: str
  chips: int
  mesh: dict[str, int]
  microbatches: int
  remat_policy: str
  fits: bool
  problem: str  # why it doesn't
  hbm_bytes: float
  params_bytes: int
  optimizer_bytes: int
  temp_bytes: int
  peak_bytes: int
  compile_s: float
  prediction: Any  # predict.Prediction or None
  mfu: tuple[float, float]  # (least, most)
  tokens: int  # that one execution works on


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(prog='betarank plan', description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--topology', required=True, help='v5e-256, v5p-128, v6e-64, ...')
  parser.add_argument('--slices', type=int, default=1, help='pods joined by a network; the data axis spans them')
  parser.add_argument('--usd_per_chip_hour', type=float, default=0.0, help='to say what the stage costs')
  parser.add_argument('--json', action='store_true', help='print the plan as JSON, nothing else')
  parser.add_argument('--search', action='store_true', help='try meshes, microbatches and remat policies; rank them')
  parser.add_argument('--no_bundles', action='store_true', help="compile in a third of the time, as training does; "
                      "memory and collectives are the same, but times are XLA's guesses, without kernels")
  parser.add_argument('--tries', type=int, default=12, help='how many settings --search compiles at most')
  config, args = load.from_command_line(parser, argv, settings=settings.PRETRAIN)
  folder = pathlib.Path(tempfile.mkdtemp(prefix='plan-'))
  _before_jax(folder, not args.no_bundles)

  from betarank.launch.plan import chips  # JAX starts from here on
  topology = chips.Topology(args.topology, args.slices)
  devices = topology.devices()
  say = (lambda text: print(text, file=sys.stderr)) if args.json else print
  run = _run(config)
  try:
    if args.search:
      from betarank.launch.plan import search
      plans = search.search(config, topology, devices, folder, args.tries, say)
    else:
      plans = list(make_plans(run, topology, devices, folder, say))
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  if args.json:
    found = {'stage': describe_stage(run, topology), 'plans': [dataclasses.asdict(plan) for plan in plans]}
    print(json.dumps(found, indent=2))
  elif not args.search:
    report(run, topology, plans, args.usd_per_chip_hour)
  if not any(plan.fits for plan in plans):
    sys.exit(1)


def _before_jax(folder: pathlib.Path, write_bundles: bool) -> None:
  """Tells JAX to look for no accelerator on this machine, and libtpu to write its bundles: it then checks each as it
  packs it, which takes twice as long as all the rest of a compile."""
  from betarank.launch.plan import bundles
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  # libtpu asks what machine it is on, and complains on stderr where it isn't on one
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_STDERR_LOG_LEVEL', '3')
  os.environ.setdefault('TPU_MIN_LOG_LEVEL', '3')
  if write_bundles:
    flags = bundles.FLAGS.format(folder=folder)
    os.environ['LIBTPU_INIT_ARGS'] = f'{os.environ.get("LIBTPU_INIT_ARGS", "")} {flags}'.strip()


def _run(config):
  from betarank.rl.config import rl_run
  from betarank.train.config import run_config
  return rl_run(config) if 'rl' in config else run_config(config)


def make_plans(run, topology, devices, folder: pathlib.Path, say=lambda text: None):
  """Yields the Plan of every program of `run`. Raises PlanError for a mesh that can't be."""
  from betarank.launch.plan import hlo, programs
  from betarank.launch.plan.predict import predict
  from betarank.model import flops_per_token
  mesh = programs.make_mesh(run, devices)
  state, programs = programs.programs(run, mesh)
  rl = getattr(run, 'rl', None)
  rows, parts = programs.run_rows(run)
  for name, lower in programs.items():
    for old in folder.iterdir():
      old.unlink()
    if name == 'decode':
      length, tokens, share = rl.max_prompt_tokens + max(rl.max_new_tokens), rl.decode_batch_size * 8, 1 / 3
    else:
      length = rl.max_prompt_tokens + max(rl.max_new_tokens) if rl else run.data.sequence_length
      tokens, share = rows * length, 1.0
    plan = Plan(
      name, topology.name + (f' x {topology.slices}' if topology.slices > 1 else ''), topology.chips,
      {axis: size for axis, size in mesh.shape.items() if size > 1}, parts, run.model.remat_policy, False, '',
      topology.chip.hbm_bytes, programs.shard_bytes(state.params), programs.shard_bytes(state.opt_state), 0, 0, 0.0,
      None, (0.0, 0.0), tokens)
    say(f'compiling {name} for {plan.topology}, {topology.chips} chips, '
        f'mesh {" x ".join(f"{a} {n}" for a, n in plan.mesh.items()) or "of one"} ...')
    start = time.perf_counter()
    try:
      compiled = lower().compile()
    except Exception as error:  # jaxlib's own kinds, by version
      if 'RESOURCE_EXHAUSTED' not in str(error) and 'Ran out of memory' not in str(error):
        raise
      yield dataclasses.replace(plan, problem=_out_of_memory(str(error)), compile_s=time.perf_counter() - start)
      continue
    took = time.perf_counter() - start
    memory = compiled.memory_analysis()
    peak = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes)
    prediction = predict(hlo.read(compiled.as_text()), folder, topology)
    useful = flops_per_token(run.model, length) * tokens * share / topology.chips / topology.chip.flops
    yield dataclasses.replace(
      plan, fits=True, temp_bytes=memory.temp_size_in_bytes, peak_bytes=peak, compile_s=took, prediction=prediction,
      mfu=(useful / prediction.step_s[1], useful / prediction.step_s[0]))


def _out_of_memory(text: str) -> str:
  used = re.search(r'[Uu]sed ([\d.]+\w) of ([\d.]+\w) hbm', text)
  return f'needs {used[1]} of {used[2]} HBM' if used else text.splitlines()[0][:200]


def describe_stage(run, topology) -> dict:
  """What doesn't depend on the compiled program."""
  from betarank import model
  rl = getattr(run, 'rl', None)
  length = rl.max_prompt_tokens + max(rl.max_new_tokens) if rl else run.data.sequence_length
  return {
    'parameters': model.parameter_counts(run.model),
    'active_parameters': model.parameter_counts(run.model, active=True),
    'flops_per_token': model.flops_per_token(run.model, length),
    'sequence_length': length,
    'steps': rl.steps if rl else run.steps,
    'chips': topology.chips,
  }


def report(run, topology, plans, usd: float) -> None:
  """Prints the plans as a person wants to read them."""
  from betarank.launch.plan.predict import ERROR
  from betarank.runtime.metrics import duration
  stage = describe_stage(run, topology)
  total, active = sum(stage['parameters'].values()), stage['active_parameters']
  parts = ', '.join(f'{name} {_short(n)}' for name, n in stage['parameters'].items() if n)
  besides = sum(active.values()) - active['embedding']
  print(f'parameters    {_short(total)} ({parts})')
  print(f'active        {_short(besides)} a token, besides the embedding')
  print(f'FLOPs         {_short(stage["flops_per_token"])} a token, at {stage["sequence_length"]:,} tokens of context')
  for plan in plans:
    mesh = ' x '.join(f'{axis} {n}' for axis, n in plan.mesh.items()) or 'one device'
    parts = f', {plan.microbatches} microbatches' if plan.program != 'decode' else ''
    print(f'\n{plan.program}: {plan.topology}, {plan.chips} chips, mesh {mesh}{parts}, remat {plan.remat_policy} '
          f'(compiled in {plan.compile_s:.0f} s)')
    if not plan.fits:
      print(f'  DOES NOT FIT: {plan.problem}. {would_fit(run, plan)}')
      continue
    p, (low, high) = plan.prediction, plan.prediction.step_s
    print(f'  memory      {_size(plan.peak_bytes)} of {_size(plan.hbm_bytes)} a chip: parameters '
          f'{_size(plan.params_bytes)}, optimizer {_size(plan.optimizer_bytes)}, temporary {_size(plan.temp_bytes)}')
    moved = ', '.join(f'{kind} {_size(size)}' for kind, size in sorted(p.collective_bytes.items())) or 'none'
    print(f'  collectives {moved} a chip; {_ms(p.collective_s)}, of which {_ms(p.exposed_s)} not hidden by compute')
    print(f'  time        {_ms(low)} to {_ms(high)}')
    if p.unread:
      print(f'  NOT COUNTED {", ".join(p.unread)}: kernels whose bundles were not found')
    if plan.program == 'decode':
      print(f'  speed       {plan.tokens / high:,.0f} to {plan.tokens / low:,.0f} tokens/s from '
            f'{run.rl.decode_batch_size} rows')
    else:
      print(f'  MFU         {plan.mfu[0]:.1%} to {plan.mfu[1]:.1%} of {topology.chip.flops / 1e12:.0f} TFLOP/s')
      print(f'  tokens      {_short(plan.tokens / high * 86_400)} to {_short(plan.tokens / low * 86_400)} a day')
    print('  parts       ' + ', '.join(
      f'{name} {_ms(compute)}' + (f' + {_ms(sent)}' if sent >= 1e-4 else '')
      for name, (compute, sent) in p.parts.items() if compute + sent >= 0.005 * low) + ' (compute + collectives)')
    print('  longest     ' + ', '.join(f'{name} {_ms(seconds)}' for name, seconds in p.hottest[:6]))
  if all(plan.fits for plan in plans):
    low, high = stage_seconds(run, plans)
    hours = [s * topology.chips / 3600 for s in (low, high)]
    what = 'if every answer took its full length' if len(plans) > 1 else f'{stage["steps"]:,} steps'
    cost = f', {hours[0] * usd:,.0f} to {hours[1] * usd:,.0f} USD' if usd else ''
    print(f'\nstage         {duration(low)} to {duration(high)} ({what}): '
          f'{hours[0]:,.0f} to {hours[1]:,.0f} chip-hours{cost}')
  print(f'\nTimes are predicted from the compiled program: {ERROR}.')


def stage_seconds(run, plans) -> tuple[float, float]:
  """Of the whole stage, without input, evaluation and checkpoints.

  RL: all answers at full length, and no prompt drawn again.
  """
  by_name = {plan.program: plan.prediction.step_s for plan in plans}
  if 'train' in by_name:
    return tuple(s * run.steps for s in by_name['train'])
  rl = run.rl
  before, total = 0, [0.0, 0.0]
  for end, new in zip((*rl.phase_steps, rl.steps), rl.max_new_tokens):
    dispatches = -(-rl.prompts_per_step * rl.group_size // rl.decode_batch_size) * new / 8
    for side in (0, 1):
      total[side] += (end - before) * (dispatches * by_name['decode'][side] + rl.minibatches * by_name['update'][side])
    before = end
  return tuple(total)


def would_fit(run, plan: Plan) -> str:
  """What to change, nearest first."""
  state = plan.params_bytes + plan.optimizer_bytes
  if plan.program == 'decode':
    return (f'Try --config.rl.decode_batch_size={max(1, run.rl.decode_batch_size // 2)}, or a larger tensor axis, '
            'which splits the cache.')
  if state > 0.5 * plan.hbm_bytes:
    return (f'Parameters and optimizer alone take {state / GB:.1f} GB a chip: make fsdp larger (data smaller), or take '
            'more chips, or --config.optimizer.moment_dtype=bfloat16.')
  ways = plan.mesh.get('data', 1) * plan.mesh.get('fsdp', 1) * plan.mesh.get('expert', 1)
  rows, key = (run.train.batch_size, 'train') if plan.program == 'train' else (
    run.rl.prompts_per_step // run.rl.minibatches * run.rl.group_size, 'rl')
  tips = []
  if rows // ways // plan.microbatches > 1:
    tips.append(f'--config.{key}.microbatches={plan.microbatches * 2}')
  if plan.remat_policy != 'full':
    tips.append('--config.model.remat_policy=full')
  tips.append('--config.train.mesh.context=2 (or tensor=2), which splits the rows themselves')
  return 'Try ' + ', then '.join(tips) + '.'


def _ms(seconds: float) -> str:
  return f'{seconds * 1e3:,.0f} ms' if seconds >= 0.1 else f'{seconds * 1e3:.3g} ms'


def _short(number: float) -> str:
  for unit, size in (('T', 1e12), ('B', 1e9), ('M', 1e6), ('k', 1e3)):
    if number >= size:
      return f'{number / size:.2f}{unit}'
  return f'{number:.0f}'


def _size(count: float) -> str:
  return f'{count / GB:.2f} GB' if count >= 1e8 else f'{count / 1e6:.2f} MB'
