"""Measures where the wall time of whole commands goes, from the shell to the exit, with an empty and a warm
compilation cache.

    python -m benchmarks.start                                      # 62M parameters, 20M tokens: for one GPU
    python -m benchmarks.start --config=configs/smoke.py --rl_config=configs/rl_smoke.py --tokens=1e5 \
        --commands=train,rl,probe,sample                            # on a CPU

Each command runs in a process of its own, first with an empty compilation cache (cold) and then again, in another
workdir, with the cache that its own first run left (warm). Data is prepared before, which isn't counted.

The first table shows the seconds that the main thread spends in each part of a command. Tracing, lowering and compiling
(or reading the compilation cache) are counted apart from the part in which they happen. The second table shows the
programs that took longest to compile. CPU seconds are those of the process and its ended children.
"""

import argparse
import collections
import contextlib
import functools
import importlib
import itertools
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time

# Module that looks a name up -> {name: the part of a command that the function is}.
PARTS = {
  'train.setup': {'make_mesh': 'devices', 'begin': 'state', 'open_log': 'log', 'read_tokenizer': 'data',
                  'finished': 'closing'},
  'runtime.checkpoint': {'Checkpoints.__init__': 'checkpoints', 'Checkpoints.save': 'saving',
                         'Checkpoints.wait': 'saving', 'Checkpoints.close': 'saving'},
  'runtime.metrics': {'Log.close': 'closing'},
  'train.loop': {'Feed.__init__': 'data', 'Feed.__next__': 'steps: data', 'Feed.close': 'closing',
                 'validate': 'evaluation', 'Texts.write': 'sampler', 'Recorder.dispatched': 'steps',
                 'Recorder.catch_up': 'steps'},
  'rl.loop': {'TaskSet': 'data', 'evaluation_sets': 'data', 'Verifier.__init__': 'verifier', 'evaluate': 'evaluation',
              'sample_and_judge': 'steps: sampling', 'minibatches': 'steps: packing', 'learn': 'steps: update'},
  'eval.probe': {'_fingerprint': 'data', 'restore': 'state', 'make_mesh': 'devices', '_gather': 'evaluation',
                 'figures': 'evaluation'},
  'eval.generate': {'open_benchmark': 'data', 'restore': 'state', 'make_mesh': 'devices', '_fill': 'sampler',
                    'print_table': 'table'},
}
COMMANDS = {
  'train': ('train.loop', ['train']),
  'rl': ('rl.loop', ['rl']),
  'probe': ('eval.probe', ['eval', 'probe']),
  'sample': ('eval.generate', ['eval', 'sample']),
}
SUMS = 'reasoning:chain_sum?max_terms=3&max_digits=1'
SAMPLE = ['--config.eval.sample.problems=64', '--config.eval.sample.samples=8',
          '--config.eval.sample.max_new_tokens=28']
COMPILING = {'/jax/core/compile/jaxpr_trace_duration': 'tracing',
             '/jax/core/compile/jaxpr_to_mlir_module_duration': 'lowering',
             '/jax/core/compile/backend_compile_duration': 'compiling'}
SMALL_S = 0.3  # programs that compile in less time are added up


# In the measured process


def child(path: str, arguments: list[str]) -> None:
  """Runs `betarank ARGUMENTS`, and writes a list of spans to the JSON file `path`.

  A span is [part of the command or kind of compiling, start, end, whether it was in the main thread, name of the
  compiled program or '']. Start and end are values of time.monotonic().
  """
  spans, main = [], threading.get_ident()

  def note(name, start, end, detail=''):
    spans.append((name, start, end, threading.get_ident() == main, detail))

  def measured(function, name):
    @functools.wraps(function)
    def call(*args, **kwargs):
      start = time.monotonic()
      try:
        return function(*args, **kwargs)
      finally:
        note(name, start, time.monotonic())
    return call

  def event(name, seconds, fun_name='', **_):
    if name in COMPILING:
      note(COMPILING[name], time.monotonic() - seconds, time.monotonic(), fun_name)

  from betarank import __main__ as betarank
  from betarank.configs import buckets
  from betarank.configs.stop import importing

  module = next(module for module, command in COMMANDS.values() if command == arguments[:len(command)])
  with importing('starting'):  # as the commands do
    buckets.register()
    import jax
    importlib.import_module(f'betarank.{module}')
  for module, names in PARTS.items():
    if f'betarank.{module}' in sys.modules:
      for name, part in names.items():
        *owner, name = name.split('.')
        owner = functools.reduce(getattr, owner, sys.modules[f'betarank.{module}'])
        setattr(owner, name, measured(getattr(owner, name), part))
  jax.monitoring.register_event_duration_secs_listener(event)
  note('start', time.monotonic(), time.monotonic())
  sys.argv = ['betarank', *arguments]
  try:
    betarank.main()
  finally:
    note('end', time.monotonic(), time.monotonic())
    pathlib.Path(path).write_text(json.dumps(spans))


# In the process that measures


def run(arguments: list[str], environment: dict[str, str]) -> tuple[dict[str, float], list, dict[str, float]]:
  """Runs a command. Returns ({part: seconds of the main thread}, spans, {'whole': wall seconds, 'CPU': CPU seconds}).

  The spans are those that `child` writes, of all threads.
  """
  with tempfile.NamedTemporaryFile() as file:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen(
      [sys.executable, '-m', 'benchmarks.start', f'--child={file.name}', *arguments],
      env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = process.communicate()
    ended, after = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
      sys.exit(f'{" ".join(arguments)}: exit status {process.returncode}\n{output}')
    spans = json.loads(pathlib.Path(file.name).read_text())
  cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  return parts(spans, began, ended), spans, {'whole': ended - began, 'CPU': cpu_s}


def parts(spans: list, began: float, ended: float) -> dict[str, float]:
  """Returns {part: seconds of the main thread}. If spans overlap, the time counts for the span that began last.

  spans: the list that `child` writes.
  began, ended: the times at which the process was started and had ended.
  """
  [start], [end] = ([span[1] for span in spans if span[0] == name] for name in ('start', 'end'))
  waiting = [('imports', began, start), ('rest', start, end), ('exit', end, ended)]
  waiting += [(name, a, b) for name, a, b, on_main, _ in spans if on_main and name not in ('start', 'end')]
  waiting.sort(key=lambda span: span[1], reverse=True)
  found, current = {}, []
  edges = sorted({edge for _, *both in waiting for edge in both})
  for a, b in itertools.pairwise(edges):
    while waiting and waiting[-1][1] <= a:
      current.append(waiting.pop())
    current = [span for span in current if span[2] > a]
    found[current[-1][0]] = found.get(current[-1][0], 0.0) + b - a
  return found


def compiled(spans: list) -> dict[str, dict[str, float]]:
  """Returns {program: {'tracing', 'lowering' or 'compiling': seconds}}.

  Programs that compile in less than SMALL_S seconds are added up under the name 'others'.

  spans: the list that `child` writes.
  """
  found = collections.defaultdict(collections.Counter)
  for name, a, b, _, program in spans:
    if name in COMPILING.values():
      found[program][name] += b - a
  shown = {}
  for program, seconds in sorted(found.items(), key=lambda item: -item[1]['compiling']):
    name = program if seconds['compiling'] >= SMALL_S else 'others'
    shown.setdefault(name, collections.Counter()).update(seconds)
  return shown


def table(title: str, rows: dict[str, list[float]], names: list[str]) -> None:
  print(f'\n{title:32}' + ''.join(f'{name:>12}' for name in names))
  for name, values in rows.items():
    if max(values) >= 0.005:
      print(f'{name:32}' + ''.join(f'{value:12.2f}' for value in values))


def main() -> None:
  if sys.argv[1:2] and sys.argv[1].startswith('--child='):
    child(sys.argv[1].removeprefix('--child='), sys.argv[2:])
    return
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/small.py')
  parser.add_argument('--rl_config', default='configs/small.py:stage=rl')
  parser.add_argument('--tokens', type=float, default=20e6, help='of pre-training')
  parser.add_argument('--rl_steps', type=int, default=4)
  parser.add_argument('--commands', default='train', help=f'some of {",".join(COMMANDS)}, in this order')
  parser.add_argument('--caches', default='cold,warm', choices=('cold', 'cold,warm'))
  parser.add_argument('--root', default='', help='a folder to keep; default: a temporary one. What a measurement of '
                      'the same commands left there is deleted')
  parser.add_argument('settings', nargs='*', help='--config.KEY=VALUE of pre-training, after a --')
  args = parser.parse_args()
  for name in args.commands.split(','):
    if name not in COMMANDS:
      parser.error(f'--commands={name}: the commands are {", ".join(COMMANDS)}')
  with contextlib.ExitStack() as stack:
    root = pathlib.Path(args.root or stack.enter_context(tempfile.TemporaryDirectory())).absolute()
    measure(args, root)


def measure(args: argparse.Namespace, root: pathlib.Path) -> None:
  betarank = [sys.executable, '-m', 'betarank']
  data = [f'--config={args.config}', f'--config.data.dir={root}/data', *args.settings]
  subprocess.run([*betarank, 'data', 'prepare', *data], check=True)
  length = [f'--config.train.tokens={round(args.tokens)}']
  results = collections.defaultdict(list)
  for cache in args.caches.split(','):
    base, rl = f'{root}/{cache}/base', f'{root}/{cache}/rl'
    commands = {
      'train': [*data, *length, f'--workdir={base}'],
      'rl': [f'--config={args.rl_config}', f'--config.train.init_from={base}', f'--config.rl.steps={args.rl_steps}',
             f'--workdir={rl}'],
      'probe': [f'--checkpoint={base}'],
      'sample': [f'--checkpoint={base}', f'--benchmark={SUMS}', *SAMPLE],
    }
    for name in args.commands.split(','):
      programs = f'{root}/programs/{name}'  # of this command only, so that no other fills the cache
      left = {'train': base, 'rl': rl, 'probe': f'{base}/eval/probe', 'sample': f'{base}/eval/samples'}[name]
      for folder in [left] + [programs] * (cache == 'cold'):
        shutil.rmtree(folder, ignore_errors=True)
      environment = {'JAX_COMPILATION_CACHE_DIR': programs}
      results[name].append(run([*COMMANDS[name][1], *commands[name]], environment))
      print(f'{name}, {cache}: {results[name][-1][2]["whole"]:.1f} s', flush=True)
  for name, runs in results.items():
    names = args.caches.split(',')
    order = list(dict.fromkeys(part for seconds, _, _ in runs for part in seconds))
    rows = {part: [seconds.get(part, 0.0) for seconds, _, _ in runs] for part in order}
    rows |= {figure: [figures[figure] for *_, figures in runs] for figure in ('whole', 'CPU')}
    table(f'{name}: seconds', rows, names)
    for cache, (_, spans, _) in zip(names, runs):
      kinds = list(COMPILING.values())
      table(f'programs of {name}, {cache}', {p: [s[k] for k in kinds] for p, s in compiled(spans).items()}, kinds)


if __name__ == '__main__':
  main()
