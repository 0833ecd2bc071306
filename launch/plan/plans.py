"""Plans the memory and time of each compiled program on one topology, and the time of the whole stage (one run of
pre-training, mid-training or RL).
"""

import dataclasses
import math
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from betarank import model
from betarank.launch.plan import hlo, programs
from betarank.launch.plan.chips import Topology
from betarank.launch.plan.predict import Prediction, memory_bytes, predict
from betarank.launch.plan.workload import Workload
from betarank.model.sharding import MESH_AXES
from betarank.runtime.state import shard_bytes

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Plan:
  """The memory and the predicted time of one program on one topology.

  Bytes are per chip, and seconds are per execution. Intervals are (least, most). hbm_bytes is the memory that a program
  can use. If the program needs more, temp_bytes, peak_bytes and mfu are 0.
  """

  program: str
  topology: str
  chips: int
  mesh: dict[str, int]
  microbatches: int  # of an update, in RL at full length
  remat_policy: str
  fits: bool
  problem: str  # why it doesn't fit; '' if it does
  hbm_bytes: float
  params_bytes: int
  optimizer_bytes: int
  temp_bytes: int
  peak_bytes: int
  compile_s: float
  prediction: Prediction | None  # None if it doesn't fit
  mfu: tuple[float, float]
  tokens: int  # the number of tokens of one execution
  reference_bytes: int = 0  # the parameters of RL's KL reference


def make_plans(work: Workload, topology: Topology, devices: Sequence[Any], folder: pathlib.Path,
               say: Callable[[str], None] = lambda text: None, only: str = '') -> Iterator[Plan]:
  """Yields the Plan of each program of `work`, after compiling the program.

  Args:
    devices: the devices of the topology.
    folder: where libtpu writes bundles. All files in it are deleted before each compile.
    say: prints a line.
    only: the name of the one program to plan; '' for all programs.

  Raises:
    PlanError: the devices can't form the mesh.
  """
  mesh = programs.make_mesh(work, devices)
  state, lowerings = programs.lowerings(work, mesh)
  microbatch = math.prod(work.microbatch(mesh.shape))
  for name, (on, lower) in lowerings.items():
    if only and name != only:
      continue
    for old in folder.iterdir():
      old.unlink()
    plan = Plan(
      program=name, topology=topology.name + (f' x {topology.slices}' if topology.slices > 1 else ''),
      chips=topology.chips, mesh={axis: size for axis, size in on.shape.items() if size > 1},
      microbatches=-(-work.rows * work.length // microbatch), remat_policy=work.run.model.remat_policy, fits=False,
      problem='', hbm_bytes=topology.chip.hbm_bytes, params_bytes=shard_bytes(state.params),
      optimizer_bytes=shard_bytes(state.opt_state), temp_bytes=0, peak_bytes=0, compile_s=0.0,
      prediction=None, mfu=(0.0, 0.0), tokens=_tokens(name, work, microbatch),
      # rl/loop.py shards the reference like the parameters.
      reference_bytes=shard_bytes(state.params) if work.keeps_reference else 0)
    say(f'compiling {name} for {plan.topology}, {topology.chips} chips, '
        f'mesh {" x ".join(f"{axis} {n}" for axis, n in plan.mesh.items()) or "of one device"} ...')
    start = time.perf_counter()
    try:
      compiled = lower().compile()
    except Exception as error:  # its type depends on the version of jaxlib
      if 'RESOURCE_EXHAUSTED' not in str(error) and 'Ran out of memory' not in str(error):
        raise
      yield dataclasses.replace(plan, problem=_out_of_memory(str(error)), compile_s=time.perf_counter() - start)
      continue
    compile_s = time.perf_counter() - start
    temporary, peak = memory_bytes(compiled.memory_analysis())
    # The train state stays in memory, also what a program doesn't take, and so does the reference, which none takes.
    peak += {'gradient': plan.optimizer_bytes, 'weights': plan.optimizer_bytes,
             'decode': plan.params_bytes + plan.optimizer_bytes}.get(name, 0) + plan.reference_bytes
    if peak > plan.hbm_bytes:
      yield dataclasses.replace(
        plan, problem=f'needs {peak / GB:.2f} of {plan.hbm_bytes / GB:.2f} GB', compile_s=compile_s)
      continue
    prediction = predict(hlo.read(compiled.as_text()), folder, topology)
    passes = 1 / 3 if name == 'decode' else 1.0  # flops_per_token counts a forward and a backward pass
    useful = model.flops_per_token(work.run.model, work.length) * plan.tokens * passes / topology.chips
    useful_s = useful / topology.chip.flops
    yield dataclasses.replace(
      plan, fits=True, temp_bytes=temporary, peak_bytes=peak, compile_s=compile_s,
      prediction=prediction, mfu=(useful_s / prediction.step_s[1], useful_s / prediction.step_s[0]))


def _tokens(program: str, work: Workload, microbatch: int) -> int:
  """Returns the number of tokens that one execution of a program processes or, for decoding, draws.

  microbatch: the number of tokens of a microbatch.
  """
  if program == 'decode':
    settings = programs.sampler_config(work)
    return settings.decode_batch_size * settings.decode_steps
  return {'train': work.rows * work.length, 'gradient': microbatch, 'optimizer': 0, 'weights': 0}[program]


def _out_of_memory(text: str) -> str:
  used = re.search(r'[Uu]sed ([\d.]+\w) of ([\d.]+\w) hbm', text)
  return f'needs {used[1]} of {used[2]} HBM' if used else text.splitlines()[0][:200]


def describe_stage(
  work: Workload, topology: Topology, plans: Sequence[Plan] = (), mean_answer: int = 0, usd_per_chip_hour: float = 0.0
) -> dict[str, Any]:
  """Returns {name: value} with the sizes, FLOPs, number of steps, time and cost of the whole stage (one run).

  The value of `seconds` is the (least, most) time of the stage, computed from the plans of its programs. It is None if
  `plans` is empty, or if a program doesn't fit. The value of `usd` is the (least, most) cost. It is None if `seconds`
  is None, or if no price is given.

  mean_answer: the mean length of RL's answers in tokens. With 0, all answers are assumed to have the maximum length.
  usd_per_chip_hour: the price; 0 if it isn't known.
  """
  c = work.run.model
  seconds = stage_seconds(work, plans, mean_answer) if plans and all(plan.fits for plan in plans) else None
  price = usd_per_chip_hour * topology.chips / 3600
  return {
    'parameters': model.parameter_counts(c),
    'active_parameters': model.parameter_counts(c, active=True),
    'flops_per_token': model.flops_per_token(c, work.length),
    'sequence_length': work.length,
    'steps': work.steps,
    'chips': topology.chips,
    'seconds': seconds,
    'usd': tuple(price * s for s in seconds) if price and seconds else None,
  }


def stage_seconds(work: Workload, plans: Sequence[Plan], mean_answer: int = 0) -> tuple[float, float]:
  """Returns the (least, most) seconds of the whole stage (one run), without input, evaluation and checkpoints.

  For RL, it is assumed that

  - the decode batch is full, and its cache is as full as in the compiled program,
  - the rows of an update have no padding,
  - prompts have their greatest length, and no group of samples is replaced.

  mean_answer: the mean length of RL's answers in tokens. With 0, all answers are assumed to have the maximum length.
  """
  by_name = {plan.program: plan for plan in plans}
  if not work.rl:
    return tuple(s * work.steps for s in by_name['train'].prediction.step_s)
  decode, gradient, optimizer, weights = (by_name[name] for name in ('decode', 'gradient', 'optimizer', 'weights'))
  drawn, updated = work.rl_tokens(mean_answer)
  return tuple(
    drawn / decode.tokens * decode.prediction.step_s[side]
    + updated / gradient.tokens * gradient.prediction.step_s[side]
    + work.rl.steps * (weights.prediction.step_s[side] + work.rl.minibatches * optimizer.prediction.step_s[side])
    for side in (0, 1))


def suggest_fix(work: Workload, plan: Plan) -> str:
  """Returns a sentence with settings to try if a plan doesn't fit into memory. The smallest change comes first."""
  state = plan.params_bytes + plan.optimizer_bytes + plan.reference_bytes
  if plan.program == 'decode':
    return (f'Try --config.rl.decode_batch_size={max(1, work.rl.decode_batch_size // 2)}, or a '
            'larger --config.rl.decode_split.')
  if state > 0.5 * plan.hbm_bytes:
    what = 'Parameters, optimizer and KL reference' if plan.reference_bytes else 'Parameters and optimizer'
    return (f'{what} alone take {state / GB:.1f} GB per chip: make fsdp larger (data smaller), or take more chips, or '
            '--config.optimizer.moment_dtype=bfloat16.')
  ways = math.prod(plan.mesh.get(axis, 1) for axis in model.RULES['batch'])
  tips = []
  if (each := work.microbatch(dict.fromkeys(MESH_AXES, 1) | plan.mesh)[0] // ways) > 1:
    tips += [f'--config.{key}={value}' for key, value in work.microbatch_override(each // 2, ways).items()]
  if plan.remat_policy != 'full':
    tips.append('--config.model.remat_policy=full')
  tips.append('--config.train.mesh.context=2 (or tensor=2), which splits the rows themselves')
  return 'Try ' + ', then '.join(tips) + '.'
