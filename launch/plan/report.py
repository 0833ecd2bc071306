"""Prints plans as text."""

from collections.abc import Sequence

from betarank.configs.terminal import duration
from betarank.launch.plan.chips import Topology
from betarank.launch.plan.plans import GB, Plan, describe_stage, suggest_fix
from betarank.launch.plan.predict import ERROR
from betarank.launch.plan.workload import Workload


def report(
  work: Workload, topology: Topology, plans: Sequence[Plan], usd_per_chip_hour: float, mean_answer: int = 0
) -> None:
  """Prints the model's size, every plan, and the time and cost of the stage (one run).

  usd_per_chip_hour: the price; with 0, the cost is left out.
  mean_answer: the mean length of RL's answers in tokens. With 0, all answers are assumed to have the maximum length.
  """
  stage = describe_stage(work, topology, plans, mean_answer, usd_per_chip_hour)
  total, active = sum(stage['parameters'].values()), stage['active_parameters']
  parts = ', '.join(f'{name} {_short(n)}' for name, n in stage['parameters'].items() if n)
  print(f'parameters    {_short(total)} ({parts})')
  print(f'active        {_short(sum(active.values()) - active["embedding"])} per token, without the embedding')
  print(f'FLOPs         {_short(stage["flops_per_token"])} per token, at {work.length:,} tokens of context')
  for plan in plans:
    _report_plan(work, topology, plan)
  if stage['seconds']:
    low, high = stage['seconds']
    hours = [s * topology.chips / 3600 for s in (low, high)]
    answers = f'answers of {mean_answer:,} tokens on average' if mean_answer else 'if every answer has its full length'
    what = answers if work.rl else f'{stage["steps"]:,} steps'
    cost = f', {stage["usd"][0]:,.0f} to {stage["usd"][1]:,.0f} USD' if stage['usd'] else ''
    print(f'\nstage         {duration(low)} to {duration(high)} ({what}): '
          f'{hours[0]:,.0f} to {hours[1]:,.0f} chip-hours{cost}')
  print(f'\nTimes are predicted from the compiled program: {ERROR}.')


def _report_plan(work: Workload, topology: Topology, plan: Plan) -> None:
  mesh = ' x '.join(f'{axis} {n}' for axis, n in plan.mesh.items()) or 'one device'
  parts = f', {plan.microbatches} microbatches' if plan.program in ('train', 'gradient') else ''
  print(f'\n{plan.program}: {plan.topology}, {plan.chips} chips, mesh {mesh}{parts}, remat {plan.remat_policy} '
        f'(compiled in {plan.compile_s:.0f} s)')
  if not plan.fits:
    print(f'  DOES NOT FIT: {plan.problem}. {suggest_fix(work, plan)}')
    return
  p, (low, high) = plan.prediction, plan.prediction.step_s
  reference = f', KL reference {_size(plan.reference_bytes)}' if plan.reference_bytes else ''
  print(f'  memory      {_size(plan.peak_bytes)} of {_size(plan.hbm_bytes)} per chip: parameters '
        f'{_size(plan.params_bytes)}, optimizer {_size(plan.optimizer_bytes)}{reference}, temporary '
        f'{_size(plan.temp_bytes)}')
  moved = ', '.join(f'{kind} {_size(size)}' for kind, size in sorted(p.collective_bytes.items())) or 'none'
  print(f'  collectives {moved} per chip; {_ms(p.collective_s)}, of which {_ms(p.exposed_s)} not hidden by compute')
  print(f'  time        {_ms(low)} to {_ms(high)}')
  if p.unread:
    print(f'  NOT COUNTED {", ".join(p.unread)}: kernels whose bundles were not found')
  if plan.program == 'decode':
    print(f'  speed       {plan.tokens / high:,.0f} to {plan.tokens / low:,.0f} tokens/s from a decode batch of '
          f'{work.rl.decode_batch_size}')
  elif plan.tokens:
    print(f'  MFU         {plan.mfu[0]:.1%} to {plan.mfu[1]:.1%} of {topology.chip.flops / 1e12:.0f} TFLOP/s')
    print(f'  tokens      {_short(plan.tokens / high * 86_400)} to {_short(plan.tokens / low * 86_400)} per day')
  print('  parts       ' + ', '.join(
    f'{name} {_ms(compute)}' + (f' + {_ms(sent)}' if sent >= 1e-4 else '')
    for name, (compute, sent) in p.parts.items() if compute + sent >= 0.005 * low) + ' (compute + collectives)')
  print('  longest     ' + ', '.join(f'{name} {_ms(seconds)}' for name, seconds in p.hottest[:6]))


def summary(plan: Plan) -> str:
  """Returns one line with the time, MFU and memory of a plan that fits."""
  low, high = plan.prediction.step_s
  return (f'{low * 1e3:,.0f} to {high * 1e3:,.0f} ms, MFU {plan.mfu[0]:.0%} to {plan.mfu[1]:.0%}, '
          f'{plan.peak_bytes / GB:.1f} of {plan.hbm_bytes / GB:.1f} GB')


def _ms(seconds: float) -> str:
  return f'{seconds * 1e3:,.0f} ms' if seconds >= 0.1 else f'{seconds * 1e3:.3g} ms'


def _short(number: float) -> str:
  for unit, size in (('T', 1e12), ('B', 1e9), ('M', 1e6), ('k', 1e3)):
    if number >= size:
      return f'{number / size:.2f}{unit}'
  return f'{number:.0f}'


def _size(count: float) -> str:
  return f'{count / GB:.2f} GB' if count >= 1e8 else f'{count / 1e6:.2f} MB'
