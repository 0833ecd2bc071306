"""Writes the metrics of a run to metrics.jsonl, TensorBoard and Weights & Biases, and prints a line every few steps.

metrics.jsonl holds one JSON object per line: {"step": 12, "train/ce_nats": 2.31, ...}. Evaluations add lines with keys
`eval/SOURCE/...`. A run that was killed and resumed writes the same values as an uninterrupted run, to the last bit,
except for the keys `time/...`.
"""

import io
import json
import math
import mmap
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath
from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from betarank.configs import light_imports
from betarank.configs.files import write_atomically
from betarank.configs.terminal import duration, fitted, progress_line, step_line
from betarank.runtime.wandb_board import WandbBoard

# bfloat16 FLOP/s per chip without sparsity, from the vendors' data sheets. Keys are prefixes of
# jax.Device.device_kind.
PEAK_FLOPS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'TPU v6e': 918e12,
  'NVIDIA A100': 312e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H200': 989e12,
}

# The seconds since the log was opened, and in earlier starts of the run up to the step that it resumed after.
ELAPSED = 'time/elapsed_s'


def peak_flops(device: jax.Device) -> float | None:
  """Returns the peak bfloat16 FLOP/s of a chip, or None if PEAK_FLOPS has no entry for the chip. CPUs have no entry."""
  kinds = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
  return PEAK_FLOPS[max(kinds, key=len)] if kinds else None


class JsonLines:
  """A file with one JSON object per line. Each object has the key `step`, which never decreases along the file.

  The constructor opens or creates the file, and removes the lines of all steps after its argument `step`, and an
  incomplete last line. It reads a local file backwards from the end, and stops at the first line that it keeps, because
  a long run has a million lines.

  Attributes:
    last: the last object that is left in the file; {} if none is left.
  """

  def __init__(self, path: epath.Path, step: int):
    self._path = path
    self._remote = '://' in str(path)
    if self._remote or os.path.islink(path):  # a link is replaced, and its target stays as it is
      content = path.read_bytes() if path.exists() else b''
      end, self.last = _end_of(content, step)
      self._content = [content[:end]]
      self._rewrite()
    else:
      self.last = _cut(path, step)
    self._file = None if self._remote else open(path, 'a', encoding='utf-8')  # noqa: SIM115 (open as long as the run)

  def write(self, step: int, values: dict[str, Any]) -> None:
    line = json.dumps({'step': step, **values}) + '\n'
    if self._remote:  # object stores can't append, so `flush` writes all lines again
      self._content.append(line.encode())
    else:
      self._file.write(line)
      self._file.flush()

  def flush(self) -> None:
    if self._remote:
      self._rewrite()

  def _rewrite(self) -> None:
    self._content = [b''.join(self._content)]
    write_atomically(self._path, self._content[0])


def _cut(path: epath.Path, step: int) -> dict[str, Any]:
  """Removes the lines of all steps after `step`, and an incomplete last line, from a local file. Creates the file if
  there is none.

  Returns the last line that is left; {} if none is left.
  """
  with open(path, 'a+b') as file:
    if not os.fstat(file.fileno()).st_size:
      return {}
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
      end, last = _end_of(content, step)
    file.truncate(end)
  return last


def _end_of(content: bytes | mmap.mmap, step: int) -> tuple[int, dict[str, Any]]:
  """Finds the last complete line whose step is at most `step`. Returns (the position after the line, the line).

  Returns (0, {}) if there is no such line.
  """
  end = content.rfind(b'\n') + 1
  while end:
    start = content.rfind(b'\n', 0, end - 1) + 1
    if (line := _parsed(content[start:end])) and line['step'] <= step:
      return end, line
    end = start
  return 0, {}


def _parsed(text: bytes) -> dict[str, Any]:
  """Returns the object on a line; {} if the line is incomplete or isn't an object with a step."""
  try:
    line = json.loads(text.decode(errors='replace'))
  except (ValueError, RecursionError):
    return {}
  return line if isinstance(line, dict) and isinstance(line.get('step'), int) else {}


def lines_of(path: epath.Path) -> Iterator[dict[str, Any]]:
  """Yields the lines of a metrics file as dictionaries, one after another. Yields nothing if there is no file.

  Lines that a killed process left incomplete are skipped.
  """
  if not path.exists():
    return
  with io.BytesIO(path.read_bytes()) if '://' in str(path) else path.open('rb') as file:
    yield from filter(None, map(_parsed, file))


class Clock:
  """Measures the time per step, and the part of it that is spent waiting for input.

  Waiting is what happens in a block `with clock.waiting():`. Time spent in a block `with clock.apart():`, for example
  for evaluation or saving, isn't counted.
  """

  def __init__(self):
    self._last = time.perf_counter()
    self._waited = 0.0
    self._apart = 0.0

  def waiting(self):
    return _Span(self, '_waited')

  def apart(self):
    return _Span(self, '_apart')

  def lap(self) -> tuple[float, float]:
    """Returns (the seconds since the last call, the share of this time that was spent waiting for input)."""
    now = time.perf_counter()
    seconds = max(now - self._last - self._apart, 1e-9)
    wait = self._waited / seconds
    self._last, self._waited, self._apart = now, 0.0, 0.0
    return seconds, wait


class _Span:
  def __init__(self, clock: Clock, name: str):
    self._clock, self._name = clock, name

  def __enter__(self):
    self._start = time.perf_counter()

  def __exit__(self, *_):
    setattr(self._clock, self._name, getattr(self._clock, self._name) + time.perf_counter() - self._start)


def describe(values: dict[str, float]) -> list[str]:
  """Returns the figures of a training step as texts to print, such as 'ce 2.3100', the most important ones first.

  values: {name: figure}, with names such as train/ce_nats.
  """
  v = {name.split('/', 1)[1]: value for name, value in values.items()}
  parts = []
  if not math.isclose(v['loss_nats'], v['ce_nats'], rel_tol=1e-6):  # plain cross-entropy: equal, but for rounding
    parts.append(f'loss {v["loss_nats"]:.4f}')
  parts += [f'ce {v["ce_nats"]:.4f}', f'entropy {v["entropy_nats"]:.4f}', f'{v["tokens_per_s"]:,.0f} tok/s',
            f'rank1 {v["rank1_accuracy"]:.3f}', f'|g| {v["grad_norm"]:.2f}', f'lr {v["lr"]:.1e}']
  if 'expert_load_max_over_mean' in v:
    parts.append(f'load {v["expert_load_max_over_mean"]:.2f}')
  if 'mfu' in v:
    parts.append(f'mfu {100 * v["mfu"]:.1f}%')
  if 'hbm_bytes' in v:
    parts.append(f'hbm {v["hbm_bytes"] / 2**30:.1f} GiB')
  return [*parts, f'wait {100 * v["input_wait_share"]:.1f}%']


def describe_evaluation(source: str, values: dict[str, float]) -> list[str]:
  """Returns the figures of one source's validation as texts to print, the most important ones first.

  values: {name: figure}, with names such as ce_nats.
  """
  return [f'  eval {source}: ce {values["ce_nats"]:.4f} nats', f'entropy {values["entropy_nats"]:.4f}',
          f'{values["bits_per_byte"]:.4f} bits/byte', f'rank1 {values["rank1_accuracy"]:.3f}',
          f'tail mass {values["tail_mass"]:.4f}']


class _Live(ProgressColumn):
  """Renders the progress line at the bottom of a terminal."""

  max_refresh = None

  def __init__(self, console: Console):
    self._console = console
    super().__init__()

  def render(self, task: Task) -> Text:
    width = self._console.width
    if task.fields['figures'] is None:
      return Text(f'compiling, and doing the first step  {duration(task.elapsed or 0)}'[:width])
    return Text(progress_line(int(task.completed), int(task.total or 1), task.fields['eta_s'], task.fields['figures'],
                              width), no_wrap=True)


class Log:
  """Writes a run's metrics and samples to files, and prints its progress. Does nothing if `active` is False."""

  def __init__(
    self, workdir: epath.Path, *, step: int, steps: int, every: int, tensorboard: bool, active: bool,
    wandb: tuple[str, dict[str, Any]] | None = None,
    describe: Callable[[dict[str, float]], list[str]] = describe,
  ):
    """Opens the files, and removes the lines of steps after `step`.

    Args:
      workdir: the workdir of the run.
      step: the step that the run resumes after; 0 for a new run.
      steps: the last step.
      every: the number of steps from one printed line to the next.
      tensorboard: whether to write TensorBoard events.
      active: whether this process logs, which only process 0 does.
      wandb: (project of Weights & Biases, the run's config) to send the figures there; None to send none.
      describe: a function that turns the figures of a step into the texts to print, the most important ones first.
    """
    self._active, self._every, self._steps, self._describe = active, every, steps, describe
    self._step_s = None
    if not active:
      return
    workdir.mkdir(parents=True, exist_ok=True)
    kept = step or -1  # a new run removes all lines, because it writes step 0 again
    self._lines = JsonLines(workdir / 'metrics.jsonl', kept)
    self._samples = JsonLines(workdir / 'samples.jsonl', kept)
    self._began = time.perf_counter() - self._lines.last.get(ELAPSED, 0.0)
    self._board = None
    if tensorboard:
      writer = light_imports.tensorboardx().SummaryWriter
      self._board = writer(str(workdir / 'tensorboard'), purge_step=step + 1, flush_secs=30)
    self._wandb = WandbBoard(*wandb, workdir) if wandb else None
    self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    self._progress = None
    if self._console.is_terminal:
      self._progress = Progress(_Live(self._console), console=self._console, transient=True)
      self._task = self._progress.add_task('', total=steps, completed=step, figures=None, eta_s=math.inf)
      self._progress.start()

  def say(self, text: str, indent: int = 0) -> None:
    """Prints a line, above the progress bar if there is one.

    indent: the number of columns by which the second and later rows are indented if the line is longer than the
      terminal is wide. With 0, the terminal itself wraps long lines.
    """
    if not self._active:
      return
    if self._progress and indent:
      text = textwrap.fill(text, self._console.width, subsequent_indent=' ' * indent, break_on_hyphens=False)
    self._console.print(text, markup=False)

  def train(self, step: int, values: dict[str, float]) -> None:
    """Records the figures of one update.

    values: {name: figure}, with names such as train/ce_nats. The figure time/step_s must be among them.
    """
    if not self._active:
      return
    self._lines.write(step, values | self._elapsed())
    step_s = values['time/step_s']
    # The first step is slow because it compiles. Later steps are averaged, so that the estimated end doesn't jump.
    self._step_s = step_s if self._step_s is None or step_s < self._step_s / 3 else 0.95 * self._step_s + 0.05 * step_s
    figures, eta_s = self._describe(values), (self._steps - step) * self._step_s
    if self._progress:
      self._progress.update(self._task, completed=step, figures=figures, eta_s=eta_s)
    if step % self._every == 0 or step == self._steps:
      self.say(step_line(step, self._steps, eta_s, figures, self._console.width if self._progress else None))
      self._scalars(step, values)

  def evaluation(self, step: int, source: str, values: dict[str, float], parts: Sequence[str]) -> None:
    """Records the figures of an evaluation as eval/SOURCE/NAME, and prints a line.

    values: {name: figure}.
    parts: the texts to print, the most important ones first. On a terminal, only as many are printed as fit on a line.
    """
    if not self._active:
      return
    named = {f'eval/{source}/{name}': value for name, value in values.items()}
    self._lines.write(step, named | self._elapsed())
    self._scalars(step, named)
    self.say(fitted(parts[0], parts[1:], self._console.width if self._progress else None))

  def sample(self, step: int, prompt: str, text: str) -> None:
    if self._active:
      self._samples.write(step, {'prompt': prompt, 'text': text})

  @property
  def elapsed_s(self) -> float:
    """The seconds that the run has taken, over all its starts; 0 if this process doesn't log."""
    return time.perf_counter() - self._began if self._active else 0.0

  def _elapsed(self) -> dict[str, float]:
    return {ELAPSED: self.elapsed_s}

  def _scalars(self, step: int, values: dict[str, float]) -> None:
    for name, value in values.items() if self._board else ():
      self._board.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.add_scalars(step, values)

  def flush(self) -> None:
    if self._active:
      self._lines.flush()
      self._samples.flush()

  def close(self) -> None:
    if self._active:
      self.flush()
      if self._board:
        self._board.close()
      if self._wandb:
        self._wandb.close()
      if self._progress:
        self._progress.stop()
