"""Samples answers to benchmarks, judges them and stores them. Any metric can then be computed without sampling again.

    RUN/eval/samples/BENCHMARK/STEP.json     settings and lineage, written before the first sample
    RUN/eval/samples/BENCHMARK/STEP.jsonl    one line per sample, in the order in which problems were finished

A sample depends only on the parameters, the prompt and (seed, benchmark, problem, sample number). The lines of a
problem are written together, once all its samples are judged. If a command is killed and run again, it draws samples
only for the problems that the file lacks. These samples are the same as in an uninterrupted run.

In a job of several processes, decoding is spread over the devices of all processes. Process 0 judges and writes.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from betarank.configs.errors import ConfigError
from betarank.configs.files import open_no_follow, read_json, write_atomically
from betarank.configs.settings import when_missing
from betarank.configs.terminal import columns, duration, fitted, waiting
from betarank.data import Tokenizer
from betarank.data.reasoning import ANSWER_MARK, question_hash
from betarank.eval.benchmarks import Benchmark, open_benchmark
from betarank.eval.config import (
  CheckpointRef,
  EvalError,
  EvalRun,
  SampleConfig,
  difference,
  make_mesh,
  read_tokenizer,
  restore,
)
from betarank.eval.sampling_metrics import collect
from betarank.eval.statistics import bootstrap_interval
from betarank.runtime import multihost
from betarank.tasks.answers import final_answer
from betarank.tasks.code_jail import Jail
from betarank.tasks.judging import numerals
from betarank.tasks.task_set import Task
from betarank.tasks.verifiers import Verdict, Verifier
from betarank.train.sampler import Prompt, Sample, Sampler

COMPARED = 16  # the verifier compares only so many distinct wrong answers to a problem, the most frequent ones
_PROGRESS_S = 10.0
_NAME_COLUMNS, _STEP_COLUMNS = 20, 21  # of the table: the widths of the column of names and of one per checkpoint
_REMOTE_S = 60.0  # object stores can't append, so the whole file is rewritten, at most once in so many seconds
_MAY_CHANGE = ('checkpoint', 'parent', 'code_version')  # values that may differ when sampling is resumed


def sample(run: EvalRun, subjects: Sequence[CheckpointRef], names: str,
           stop: Callable[[], None] = lambda: None) -> None:
  """Samples answers to benchmarks for each checkpoint, and prints a table of the results.

  Samples that are already stored aren't drawn again.

  Args:
    run: the settings of the evaluation.
    subjects: the checkpoints.
    names: the benchmarks, separated by commas.
    stop: a function that is called between the problems of a benchmark. If it raises an error, sampling ends, and the
      samples that have been drawn so far are judged and stored.

  Raises:
    ConfigError, DataError, EvalError, CheckpointError or VerifierError: a checkpoint, a setting, a benchmark or the
      verifier can't be used.
  """
  c = run.eval.sample
  if not (names := [name for name in names.split(',') if name]):
    raise EvalError('--benchmark: name one or more, separated by commas')
  first = jax.process_index() == 0
  _check_held_out(c, subjects[-1], names)
  tokenizer = read_tokenizer(run, subjects[-1])
  mesh = make_mesh(run, 'eval.sample.decode_batch_size', c.decode_batch_size)
  benchmarks = [open_benchmark(name, c) for name in names]
  for benchmark in benchmarks:
    if benchmark.left_out and first:
      print(f'{benchmark.name}: {benchmark.left_out}', flush=True)
  prompts = {b.name: _prompts(b, tokenizer) for b in benchmarks}
  # A jail is created only if there are programs to judge, because not every system supports it.
  jail = Jail(run.eval.code) if first and any(b.answer_format == 'code' for b in benchmarks) else None
  with jax.set_mesh(mesh), Verifier(c.verifier, jail) if first else contextlib.nullcontext() as verifier:
    samplers = {b.name: _sampler(run, prompts[b.name], tokenizer, mesh) for b in benchmarks}
    files = {s.step: [SampleFile(s, b, run, first) for b in benchmarks] for s in subjects}
    for subject in subjects:
      params = None
      for benchmark, file in zip(benchmarks, files[subject.step]):
        if file.missing and params is None:
          with waiting(f'restoring step {subject.step}'):
            params = restore(run, subject, mesh)
        _fill(file, benchmark, samplers[benchmark.name], params, prompts[benchmark.name], tokenizer, verifier, c.seed,
              stop)
  if first:
    print_table([file for some in files.values() for file in some])
  multihost.wait_for_all('sampled')  # process 0 may judge for longer than JAX would wait for it at the end


def _check_held_out(c: SampleConfig, ref: CheckpointRef, names: Sequence[str]) -> None:
  """Raises ConfigError if generated problems are to be asked that the checkpoint's RL may have trained on.

  c: the settings, whose held_out_fraction selects generated problems. Benchmarks from files don't depend on it.
  names: the benchmarks.
  """
  task = ref.meta['config'].get('rl', {}).get('task', {})
  if not task.get('uri', '').startswith('reasoning:'):
    return  # no RL, or RL on files
  kept = task.get('held_out_fraction', 1.0)
  made = [name for name in names if name.startswith('reasoning:')]
  if made and c.held_out_fraction > kept:
    raise ConfigError(f'--benchmark={made[0]}: {ref.run} held out {kept:g} of its RL, so it may have been trained on '
                      'these problems; config.eval.sample.held_out_fraction must be at most that, got '
                      f'{c.held_out_fraction:g}')


def _prompts(benchmark: Benchmark, tokenizer: Tokenizer) -> list[Prompt]:
  return [Prompt(i, [tokenizer.bos, *tokenizer.encode(task.prompt).tolist()]) for i, task in enumerate(benchmark.tasks)]


def _sampler(run: EvalRun, prompts: list[Prompt], tokenizer: Tokenizer, mesh) -> Sampler:
  """Returns a sampler that accepts prompts as long as the longest of `prompts`.

  The maximum prompt length is rounded up to a multiple of 64 tokens, so that few shapes are compiled.
  """
  longest = max(len(prompt.tokens) for prompt in prompts)
  try:
    return Sampler(run.model, run.eval.sample.sampler(-(-longest // 64) * 64), tokenizer.eos, mesh)
  except ValueError as error:
    raise ConfigError(f'config.eval.sample.{error}') from None


def _fill(file, benchmark, sampler, params, prompts, tokenizer, verifier, seed, stop=lambda: None) -> None:
  """Draws and judges the samples that `file`, a SampleFile, lacks, and writes them to it.

  While the samples of one problem are judged, the device draws the samples of the next problems. Only process 0 has a
  verifier. The other processes take part in drawing, and don't judge or write.

  prompts: the prompts of all problems of the benchmark.
  verifier: judges answers; None in all processes except process 0.
  stop: as in `sample`.
  """
  if not file.missing:
    if verifier:
      print(f'{file.path}: all {file.problems} problems are there already', flush=True)
    return
  missing = [prompts[i] for i in file.missing]
  drawn = sampler(params, missing, samples=file.n, seed=seed, step=benchmark_key(benchmark.name))
  counted = enumerate(drawn, 1)
  if not verifier:
    for count, _ in counted:
      if count < len(missing):
        stop()
    return
  progress = _Progress(file)
  drawing = waiting(f'drawing {file.n} answers to each of {len(missing)} problems')
  with concurrent.futures.ThreadPoolExecutor(1) as judge, drawing:
    judging = collections.deque()

    def write(group: list[Sample]) -> None:
      lines = judged(group, benchmark.tasks[group[0].prompt_id], tokenizer, verifier)
      file.append(lines)
      progress(lines)

    try:
      for count, group in counted:
        judging.append(judge.submit(write, group))
        while judging and (judging[0].done() or len(judging) > 8):
          judging.popleft().result()
        if count < len(missing):
          stop()
    finally:  # also if `stop` raises: what is drawn is judged and kept
      for future in judging:
        future.result()
      file.close()
  print(f'{file.path}: written', flush=True)


def benchmark_key(name: str) -> int:
  """Returns a hash of the name of a benchmark, an integer in [0, 2^32).

  The sampler gets this number as `step`, so that the random numbers differ between benchmarks.
  """
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])


# Judging


def judged(group: list[Sample], task: Task, tokenizer: Tokenizer, verifier: Verifier) -> list[dict[str, Any]]:
  """Judges all samples of one problem. Returns one dict per sample, which becomes a line of the SampleFile.

  A dict has the sample's text, answer, verdict, length and log-probability in nats. Its key 'group' has a number that
  is the same for equal answers (see `answer_classes`). Its key 'question' has a hash of the question, because generated
  problems may repeat.

  group: all samples of the problem.
  """
  texts = [tokenizer.decode(s.text_tokens) for s in group]
  answers = [final_answer(text, task) for text in texts]
  verdicts = verifier.verify([(text, task) for text in texts])
  classes = answer_classes(answers, verdicts, task, verifier)
  return [{
    'problem': s.prompt_id, 'question': f'{question_hash(task.question):016x}', 'sample': s.index, 'text': text,
    'answer': answer, 'verdict': verdict.name.lower(),
    'logp': float(np.sum(s.logp, dtype=np.float64)), 'tokens': len(s.tokens),
    'finish': 'stop' if s.finish == 'eos' else 'length', 'group': group_number,
  } for s, text, answer, verdict, group_number in zip(group, texts, answers, verdicts, classes)]


def answer_classes(
  answers: Sequence[str | None], verdicts: Sequence[Verdict], task: Task, verifier: Verifier
) -> list[int]:
  """Numbers the answers to a problem so that equal answers have the same number. Returns one number per answer.

  Numbers count up from 0, in the order in which answers first appear. An answer that is None gets -1.

  Two answers are equal if their texts are equal. In mathematics, two answers are also equal in these cases:

  - They are the same number, or the same text apart from delimiters, spaces and a final full stop.
  - Both are right.
  - Both are wrong, but the verifier accepts one of them if the other is the reference. Only the COMPARED most frequent
    wrong answers are compared in this way, because the number of pairs grows quadratically.

  answers: the final answer of each sample; None if a sample has no answer.
  verdicts: the verdict on each answer.
  """
  keys = [None if answer is None else _key(answer, task) for answer in answers]
  home = {key: key for key in keys if key is not None}
  if task.verifier == 'math':
    right = {key: None for key, verdict in zip(keys, verdicts) if key is not None and verdict == Verdict.RIGHT}
    home |= {key: next(iter(right)) for key in right}
    text_of = dict(zip(reversed(keys), reversed(answers)))  # of equal keys, the text of the first answer
    counts = collections.Counter(key for key in keys if key is not None and key not in right)
    wrong = [key for key, _ in counts.most_common(COMPARED)]
    pairs = [(j, i) for j in range(len(wrong)) for i in range(j)]
    both_ways = [*pairs, *((i, j) for j, i in pairs)]  # not symmetric: an answer may omit parts that a reference needs
    alike = verifier.verify([_compared(text_of[wrong[j]], text_of[wrong[i]], task) for j, i in both_ways])
    for (j, i), *verdicts in zip(pairs, alike, alike[len(pairs):]):
      if Verdict.RIGHT in verdicts and home[wrong[j]] == wrong[j] and home[wrong[i]] == wrong[i]:
        home[wrong[j]] = wrong[i]
  numbers: dict[Any, int] = {}
  return [-1 if key is None else numbers.setdefault(home[key], len(numbers)) for key in keys]


def _key(answer: str, task: Task) -> Any:
  if task.verifier != 'math':
    return answer
  value = numerals.exact_number(answer)
  return numerals.plain(answer) if value is None else value


def _compared(answer: str, reference: str, task: Task) -> tuple[str, Task]:
  """Returns the (text, task) that a verifier must judge to compare two answers to a problem.

  The verdict on `text` is RIGHT if the two answers are equal.

  answer: one of the two answers. `text` states it as the final answer.
  reference: the other answer. It is the reference answer of the returned task.
  task: the problem.
  """
  return ANSWER_MARK + answer, dataclasses.replace(task, reference=reference, answer_format='line', answer_lines=0)


# The files


class SampleFile:
  """Stores the samples of one checkpoint on one benchmark in a file.

  Attributes:
    path: the path of the file.
    n: the number of samples that are wanted for each problem.
    problems: the number of problems of the benchmark.
    missing: the indices of the problems that didn't have all their samples in the file when it was opened. All samples
      of these problems must be drawn.
  """

  def __init__(self, subject: CheckpointRef, benchmark: Benchmark, run: EvalRun, writes: bool = True):
    """Opens the files of this checkpoint and benchmark, or creates them.

    There are two files: STEP.jsonl with the samples, and STEP.json with the settings. If they exist, the stored
    settings must equal the settings of `run`. If STEP.jsonl has only some of a problem's samples, these are removed, so
    that all samples of the problem are drawn again.

    In a job of several processes, every process must create this object, because process 0 broadcasts `missing` to the
    others.

    writes: whether this process writes the files. Only process 0 may do so.

    Raises:
      EvalError: the existing samples were made with other settings, or the file of settings is missing or unreadable.
    """
    c = run.eval.sample
    folder = subject.run / 'eval' / 'samples' / benchmark.folder
    self.path, self.n, self.problems = folder / f'{subject.step}.jsonl', c.samples, len(benchmark.tasks)
    self.about = {
      **subject.lineage(), 'benchmark': benchmark.name, 'n': c.samples, 'problems': self.problems,
      'temperature': c.temperature, 'top_p': c.top_p, 'top_k': c.top_k, 'max_new_tokens': c.max_new_tokens,
      'seed': c.seed, 'shots': benchmark.shots, 'answer_format': benchmark.answer_format,
      'data_sha256': benchmark.data_sha256, 'file_sha256': benchmark.file_sha256,
      'answer_chars': c.verifier.answer_chars,
    }
    settings = folder / f'{subject.step}.json'
    if settings.exists():
      self._check(settings)
    elif writes and self.path.exists():
      raise EvalError(f'{self.path}: samples without their settings, {settings.name}; remove them to sample again')
    elif writes:
      write_atomically(settings, json.dumps(self.about, indent=1) + '\n')
    self._remote = '://' in str(self.path)
    self._text, lacks_P = self._take_up() if writes else ('', np.ones(self.problems, bool))
    self.missing = np.flatnonzero(multihost.of_first_process(lacks_P)).tolist()
    self._file, self._written = None, time.monotonic()

  def _check(self, settings: epath.Path) -> None:
    try:
      # Older files don't have answer_chars.
      before = {'answer_chars': when_missing('eval.sample.verifier.answer_chars')} | read_json(settings)
    except (ValueError, TypeError):
      raise EvalError(f'{settings}: not a JSON object; remove it and {self.path} to sample again') from None
    if differs := difference(before, self.about, [key for key in self.about if key not in _MAY_CHANGE]):
      raise EvalError(f'{settings}: holds samples made with {differs}; set it back, or remove both files of step '
                      f'{self.about["step"]} there to sample again')

  def _take_up(self) -> tuple[str, np.ndarray]:
    """Removes the samples of all problems that don't have all their samples in the file.

    Returns (kept, missing). `kept` is the remaining content if the file is in a bucket. The caller needs it to add
    samples, because a file in a bucket can only be written as a whole. For a local file, `kept` is ''. `missing` is
    bool [P], one value per problem: True if all samples of the problem must be drawn.

    Lines are read one by one, because a local file may be larger than memory.
    """
    there_PN, count, size = np.zeros((self.problems, self.n), bool), 0, 0
    for text, problem, sample in self._lines():
      there_PN[problem, sample] = True
      count, size = count + 1, size + len(text)
    whole_P = there_PN.all(1)
    if not self.path.exists():
      return '', ~whole_P
    if count != whole_P.sum() * self.n or size != self.path.stat().length:
      temporary = self.path.parent / (self.path.name + '.tmp')
      with temporary.open('wb') if self._remote else open_no_follow(temporary, 'wb') as kept:
        for text, problem, sample in self._lines():
          if whole_P[problem] and there_PN[problem, sample]:
            there_PN[problem, sample] = False  # so that each sample is kept only once
            kept.write(text)
      temporary.replace(self.path)
    return self.path.read_text() if self._remote else '', ~whole_P

  def _lines(self) -> Iterator[tuple[bytes, int, int]]:
    """Yields (line, problem index, sample number) for each complete and valid line of the file."""
    if not self.path.exists():
      return
    with self.path.open('rb') as file:
      for text in file:
        try:
          line = json.loads(text) if text.isascii() and text.endswith(b'\n') else {}
          problem, sample = line['problem'], line['sample']
        except (ValueError, RecursionError, KeyError, TypeError):
          continue  # an incomplete line
        if type(problem) is type(sample) is int and 0 <= problem < self.problems and 0 <= sample < self.n:
          yield text, problem, sample

  def append(self, lines: list[dict[str, Any]]) -> None:
    """Appends the lines of one problem to the file, and flushes the file, so that other processes can read these lines.

    A file in a bucket is written at most once every _REMOTE_S seconds, and when it is closed.
    """
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    if self._remote:
      self._text += text
      if time.monotonic() - self._written > _REMOTE_S:
        self.close()
    else:
      if self._file is None:
        self._file = open_no_follow(self.path, 'a', encoding='utf-8')  # open as long as there is more
      self._file.write(text)
      self._file.flush()

  def close(self) -> None:
    if self._remote:
      write_atomically(self.path, self._text)
      self._written = time.monotonic()
    elif self._file is not None:
      self._file.close()


def print_table(files: Sequence[SampleFile]) -> None:
  """Prints a table for each benchmark, with one row per metric and one column per checkpoint.

  If a table is wider than the terminal, its columns are divided over several tables, one below the other.
  """
  console, width = Console(highlight=False, soft_wrap=True), columns()
  of_benchmark: dict[str, list[SampleFile]] = {}
  for file in files:
    of_benchmark.setdefault(file.about['benchmark'], []).append(file)
  for name, all_steps in of_benchmark.items():
    console.print(f'\n{name}: {all_steps[0].problems} problems, {all_steps[0].n} samples each\n'
                  'percentages have 95 % intervals over different questions', markup=False)
    at_once = (width - _NAME_COLUMNS) // _STEP_COLUMNS if width else len(all_steps)
    for start in range(0, len(all_steps), max(1, at_once)):
      some = all_steps[start:start + max(1, at_once)]
      found = [_metrics(file) for file in some]
      table = Table('', *(f'step {file.about["step"]}' for file in some), box=None, padding=(0, 2, 0, 0))
      for metric in found[0]:
        table.add_row(metric, *(of_step[metric] for of_step in found))
      console.print(table)


def _metrics(file: SampleFile) -> dict[str, str]:
  """Returns {title of a metric: value} for the samples in a file, with each value formatted for the table."""
  with file.path.open('rb') as lines:
    samples = collect(map(json.loads, lines))
  m = samples.metrics()
  return {
    'different questions': str(len(samples.questions)),
    f'Avg@{file.n}': _percent(m['avg_at_n']), f'Cons@{file.n}': _percent(m['cons_at_n']),
    **{f'Pass@{k}': _percent(m['pass_at_k'][:, k - 1]) for k in (4, 16, 64) if k <= file.n},
    'truncated': f'{100 * m["truncated_share"].mean():.0f} %', 'tokens': f'{m["length_tokens"].mean():,.0f}',
    'distinct answers': f'{m["distinct_answers"].mean():.1f}', 'undecided verdicts': str(samples.undecided)}


def _percent(values_P: np.ndarray) -> str:
  if np.isnan(values_P).all():
    return '-'
  e = bootstrap_interval(values_P, bounds=(0.0, 1.0), resamples=2000)
  return f'{100 * e.mean:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]'


class _Progress:
  """Prints a line of progress every _PROGRESS_S seconds, and after the last problem."""

  def __init__(self, file: SampleFile):
    self._file, self._start = file, time.monotonic()
    self._shown = self._start
    self._done, self._todo = 0, len(file.missing)
    self._right = self._samples = self._tokens = 0

  def __call__(self, lines: list[dict[str, Any]]) -> None:
    self._done += 1
    self._samples += len(lines)
    self._right += sum(line['verdict'] == 'right' for line in lines)
    self._tokens += sum(line['tokens'] for line in lines)
    now = time.monotonic()
    if self._done == 1:
      self._first = now  # the first problem waits for the compilation, which says nothing about the others
    if now - self._shown < _PROGRESS_S and self._done < self._todo:
      return
    self._shown = now
    about = self._file.about
    rate = (now - self._first) / (self._done - 1) if self._done > 1 else math.inf
    eta_s = rate * (self._todo - self._done) if self._done < self._todo else 0.0
    before = self._file.problems - self._todo
    print(fitted(f'step {about["step"]}  problem {before + self._done} of {self._file.problems}', [
      f'right {self._right / self._samples:.3f}', f'eta {duration(eta_s)}',
      f'{self._tokens / (now - self._start):,.0f} tok/s', about['benchmark']], columns()), flush=True)
