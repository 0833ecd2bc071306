"""Reads the files of a workdir for the report.

A run may be unfinished, its log incomplete, or its config unreadable. Therefore no function here raises an error
because of a file's content. Whatever can be read is used, and for everything else a line is added to `Sweep.notes`.
"""

import collections
import io
import math
import shlex
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
from etils import epath

from betarank.configs.files import from_json, is_regular
from betarank.configs.settings import when_missing
from betarank.eval import sampling_metrics
from betarank.eval.columns import Columns
from betarank.eval.report.runs import DataIdentity, Run, SampleSet, Start, Sweep, number, setting
from betarank.runtime import checkpoint

EXAMPLES = 6  # so many sample texts are kept of each file
MOST_BYTES = 2**30  # larger files aren't read, because their content is kept in memory
MOST_METRICS_BYTES = 2**33  # of metrics.jsonl, of which only the figures are kept
# Scores of lm-evaluation-harness. If a task has several of them, the first in this order is used.
HARNESS_SCORES = ('acc', 'exact_match', 'em', 'pass@1', 'acc_norm', 'f1')


def read_run(path: epath.Path, name: str, sweep: Sweep) -> Run:
  """Returns a run with everything that can be read in the workdir `path`. Adds notes to `sweep` on what can't be read.

  name: the name of the run in the report.
  """
  config = read_object(path / 'config.json', sweep)
  run = Run(path, name, config or {})
  if config is None and not (path / 'config.json').exists():
    sweep.note(name, 'no config.json; its figures can\'t be given to an arm')
  _read_metrics(run, sweep)
  _read_lineage(run, sweep)
  _read_start(run, sweep)
  _read_probes(run, sweep)
  _read_samples(run, sweep)
  _read_harness(run, sweep)
  return run


# Files


def read_object(path: epath.Path, sweep: Sweep) -> dict[str, Any] | None:
  """Returns the JSON object in a file; None if the file doesn't exist, can't be read or doesn't contain an object.

  If the file exists but the result is None, a note in `sweep` says why.
  """
  text = _text(path, sweep)
  if text is None:
    return None
  try:
    value = from_json(text)
  except ValueError as error:
    sweep.note(_short(path, sweep), f'not JSON ({error})')
    return None
  if not isinstance(value, dict):
    sweep.note(_short(path, sweep), 'no JSON object')
    return None
  return value


def _lines_of(path: epath.Path, sweep: Sweep, most_bytes: int = MOST_BYTES) -> Iterator[dict[str, Any]]:
  """Yields the JSON objects in a file that has one object per line.

  Malformed lines are left out, and a note in `sweep` says how many there are. If the file doesn't exist, yields
  nothing.

  most_bytes: the largest size of a file that is read.
  """
  bad, last, ended = [], 0, True
  try:
    with _opened(path, most_bytes) as file:
      for last, line in enumerate(file, 1):
        ended = line.endswith(b'\n')
        try:
          if not (line := line.decode('utf-8', errors='replace')).strip():
            continue
          value = from_json(line)
        except ValueError:
          value = None
        if isinstance(value, dict):
          yield value
        else:
          bad.append(last)
  except FileNotFoundError:
    return
  except OSError as error:
    sweep.note(_short(path, sweep), f'could not be read ({error.strerror or error})')
  if bad == [last] and not ended:
    sweep.note(_short(path, sweep), 'the last line is half written (the run was ended, or is writing it now); left out')
  elif bad:
    shown = ', '.join(map(str, bad[:5])) + (', ...' if len(bad) > 5 else '')
    sweep.note(_short(path, sweep), f'{len(bad)} malformed lines left out (line {shown})')


def _opened(path: epath.Path, most_bytes: int) -> IO[bytes]:
  """Opens a file for reading. The content of a file in a bucket is read into memory at once.

  Raises:
    OSError: the file doesn't exist, is larger than `most_bytes`, isn't a regular file, or can't be read.
  """
  if path.exists() and not is_regular(path):
    raise OSError('it is no file')
  if path.stat().length > most_bytes:
    raise OSError(f'it is larger than {most_bytes} bytes')
  return io.BytesIO(path.read_bytes()) if '://' in str(path) else path.open('rb')


def _text(path: epath.Path, sweep: Sweep) -> str | None:
  try:
    with _opened(path, MOST_BYTES) as file:
      return file.read().decode('utf-8', errors='replace')
  except FileNotFoundError:
    return None
  except OSError as error:
    sweep.note(_short(path, sweep), f'could not be read ({error.strerror or error})')
    return None


def _short(path: epath.Path, sweep: Sweep) -> str:
  try:
    return str(path.relative_to(sweep.root))
  except ValueError:
    return str(path)


def _steps_in(folder: epath.Path) -> list[int]:
  if not folder.exists():
    return []
  return sorted(int(p.stem) for p in folder.iterdir() if p.suffix == '.json' and p.stem.isdecimal())


def _folders_in(folder: epath.Path) -> list[epath.Path]:
  return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.exists() else []


# Training


def _read_metrics(run: Run, sweep: Sweep) -> None:
  path = run.path / 'metrics.jsonl'
  if not path.exists():
    sweep.note(run.name, 'no metrics.jsonl yet')
    return
  columns, without_step, wrong, not_finite = Columns(), 0, set(), {}
  for line in _lines_of(path, sweep, MOST_METRICS_BYTES):
    step = line.get('step')
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**53:
      without_step += 1
      continue
    for name, value in line.items():
      if not name.startswith(('train/', 'eval/', 'time/')):
        continue
      x = value if type(value) is float else number(value)
      if not math.isfinite(x):
        if isinstance(value, float):
          not_finite.setdefault(name, []).append(step)
        else:
          wrong.add(name)
        x = math.nan
      columns.add(step, name, x)
  run.curves = columns.curves()
  if without_step:
    sweep.note(run.name, f'{without_step} lines of metrics.jsonl have no step; left out')
  for name in sorted(wrong):
    sweep.note(run.name, f'metrics.jsonl has values of {name} that are no numbers; left out')
  for name, steps in sorted(not_finite.items()):
    if not name.endswith('standard_error'):  # it is NaN if there is only one problem
      sweep.note(run.name, f'{name} is NaN or infinite at {len(steps)} steps, first at step {min(steps)}; left out')
  run.texts = list(collections.deque(_lines_of(run.path / 'samples.jsonl', sweep), EXAMPLES))


def _read_lineage(run: Run, sweep: Sweep) -> None:
  """Sets the run's parent_path, checkpoint, code_version and identity, from its newest checkpoint.

  If there is no checkpoint yet, only parent_path is set, from the config.
  """
  run.parent_path = setting(run.config, 'train.init_from') or ''
  if not isinstance(run.parent_path, str):
    run.parent_path = ''
  if not (run.path / 'checkpoints').exists():
    return
  try:
    found = checkpoint.find(str(run.path))
    meta = checkpoint.read_meta(found)
  except (checkpoint.CheckpointError, OSError) as error:
    sweep.note(run.name, str(error).replace(f'{run.path}/', ''))
    return
  run.checkpoint = _short(found, sweep)
  run.parent_path = str(meta.get('parent') or run.parent_path)
  run.code_version = str(meta.get('code_version') or '')
  run.identity = _identity(meta)


def _identity(meta: Mapping[str, Any]) -> DataIdentity:
  sources = setting(meta, 'cursor.sources')
  sources = sources if isinstance(sources, dict) else {}
  fingerprints = {name: str(source['fingerprint']) for name, source in sources.items()
                  if isinstance(source, dict) and 'fingerprint' in source}
  rows = [number(source.get('rows')) for source in sources.values() if isinstance(source, dict)]
  return DataIdentity(str(meta.get('tokenizer_sha256') or ''), fingerprints, sum(rows) if rows else math.nan,
                      number(setting(meta, 'cursor.prompts')), str(setting(meta, 'cursor.problems') or ''),
                      str(setting(meta, 'cursor.kept') or ''), str(setting(meta, 'cursor.reward') or ''))


def _read_start(run: Run, sweep: Sweep) -> None:
  found = read_object(run.path / 'run.json', sweep) or {}
  command = found.get('command') or ''
  if isinstance(command, list):  # sys.argv
    command = f'betarank {shlex.join(map(str, command[1:]))}'
  run.start = Start(str(command), str(found.get('device_kind') or ''), number(found.get('devices')),
                    number(found.get('started_s')))


# Evaluations


def _read_probes(run: Run, sweep: Sweep) -> None:
  folder = run.path / 'eval' / 'probe'
  for step in _steps_in(folder):
    probe = read_object(folder / f'{step}.json', sweep)
    if probe is None:
      continue
    domains = probe.get('domains')
    if not isinstance(domains, dict) or not all(isinstance(domain, dict) for domain in domains.values()) or not domains:
      sweep.note(_short(folder / f'{step}.json', sweep), 'a probe without domains; left out')
      continue
    run.probes[step] = probe


def _read_samples(run: Run, sweep: Sweep) -> None:
  for benchmark in _folders_in(run.path / 'eval' / 'samples'):
    for step in _steps_in(benchmark):
      where = _short(benchmark / f'{step}.jsonl', sweep)
      settings = {'answer_chars': when_missing('eval.sample.verifier.answer_chars')}  # older files don't have it
      settings |= read_object(benchmark / f'{step}.json', sweep) or {}
      good, wrong, examples, shown = [], [], [], set()
      kept = (*sampling_metrics.FIELDS, sampling_metrics.QUESTION)
      for line in _lines_of(benchmark / f'{step}.jsonl', sweep):
        try:
          sampling_metrics.parse(line)
        except ValueError as error:
          wrong.append(str(error))
          continue
        if len(examples) < EXAMPLES and (kind := line['verdict']) not in shown:
          shown.add(kind)
          examples.append(line)
        good.append({name: line[name] for name in kept if name in line})
      if wrong:
        sweep.note(where, f'{len(wrong)} samples left out: {wrong[0]}')
      if not good:
        sweep.note(where, 'no samples yet')
        continue
      found = SampleSet(settings, sampling_metrics.collect(good), examples)
      named = settings.get('benchmark')
      run.samples.setdefault(named if isinstance(named, str) else benchmark.name, {})[step] = found
      _note_samples(where, found, sweep)


def _note_samples(where: str, found: SampleSet, sweep: Sweep) -> None:
  there_P = (~np.isnan(found.samples.tokens_PN)).sum(1)
  problems, n = number(found.settings.get('problems')), number(found.settings.get('n'))
  if problems > len(there_P):
    sweep.note(where, f'{len(there_P)} of {problems:.0f} problems so far')
  if n > there_P.min():
    sweep.note(where, f'{int((there_P < n).sum())} problems have fewer than n = {n:.0f} samples so far')
  if found.samples.undecided:
    sweep.note(where, f'{found.samples.undecided} samples undecided by the verifier; counted neither right nor wrong')


def _read_harness(run: Run, sweep: Sweep) -> None:
  for tasks in _folders_in(run.path / 'eval' / 'harness'):
    for step in _steps_in(tasks):
      found = read_object(tasks / f'{step}.json', sweep)
      if found is None:
        continue
      results = found.get('results')
      if not isinstance(results, dict):
        sweep.note(_short(tasks / f'{step}.json', sweep), 'no results of lm-evaluation-harness; left out')
        continue
      groups = found.get('groups')
      results = {**results, **(groups if isinstance(groups, dict) else {})}
      asked = found.get('tasks')
      how = {key: found.get(key) for key in ('num_fewshot', 'limit', 'lm_eval', 'max_length', 'seed')}
      for task in asked if isinstance(asked, list) else results:  # the score of a group includes its tasks
        values = results.get(str(task))
        if isinstance(values, dict) and (score := _harness_score(values)):
          run.harness.setdefault(step, {})[str(task)] = {**score, 'settings': how}


def _harness_score(values: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns the score of a task of lm-evaluation-harness, as a dict with the keys 'metric', 'score' and
  'standard_error'. The metric is the first of HARNESS_SCORES that the task has. If it has none, returns None.

  values: the harness's results for the task, such as {'acc,none': 0.3, 'acc_stderr,none': 0.01}.
  """
  for name in HARNESS_SCORES:
    for key, value in values.items():
      metric, _, kind = key.partition(',')
      if metric == name and math.isfinite(number(value)):
        return {'metric': name, 'score': number(value), 'standard_error': number(values.get(f'{name}_stderr,{kind}'))}
  return None
