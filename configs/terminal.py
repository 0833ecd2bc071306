"""Shows the progress of long-running work on a terminal.

data, runtime and train need this module, so it is in configs, which every package may import.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

BAR = 16  # columns


@contextlib.contextmanager
def waiting(text: str, console: Console | None = None) -> Iterator[None]:
  """Shows a spinner, `text` and the elapsed time while the block runs. Shows nothing if the output isn't a terminal.

  The output of the block appears above the spinner.
  """
  console = console or Console(highlight=False)
  if not console.is_terminal:
    yield
    return
  with Progress(SpinnerColumn(), TextColumn('{task.description}'), TimeElapsedColumn(), console=console,
                transient=True) as bar:
    bar.add_task(text)
    yield


def progress_line(step: int, steps: int, eta_s: float, figures: Sequence[str], width: int) -> str:
  """Returns a line with a bar, the percentage, the time left, the step, and as many figures as fit.

  eta_s: the time left, in seconds.
  figures: texts such as 'loss 2.31'.
  width: the largest length of the line, in columns. The bar, the percentage and the time left are always shown.
  """
  share = step / max(steps, 1)
  full = min(BAR, int(BAR * share + 0.5))
  line = f'{"━" * full}{"╌" * (BAR - full)} {100 * share:3.0f}%  eta {duration(eta_s)}'
  return fitted(line, [_step(step, steps), *figures], width)


def step_line(step: int, steps: int, eta_s: float, figures: Sequence[str], width: int | None = None) -> str:
  """Returns the line that is printed after a step: the number of the step, the percentage and the figures.

  eta_s, figures: as in `progress_line`.
  width: the width of the terminal, in columns. Figures that don't fit are left out. None means that the output is a log
    file. The line then has all figures, followed by the time left.
  """
  start = f'{_step(step, steps)} {100 * step / steps:3.0f}%'
  return fitted(start, figures, width) if width else '  '.join([start, *figures, f'eta {duration(eta_s)}'])


def fitted(start: str, parts: Sequence[str], width: int | None) -> str:
  """Returns `start` and as many of the parts as fit, separated by two spaces.

  width: the largest length of the line, in columns. None means that all parts are shown.
  """
  line = start
  for part in parts:
    if width and len(line) + 2 + len(part) > width:
      break
    line += f'  {part}'
  return line


def columns() -> int | None:
  """Returns the width of the terminal, in columns. None means that the output isn't a terminal."""
  console = Console()
  return console.width if console.is_terminal else None


def short(number: float) -> str:
  """Returns a number as text with three digits and a letter for thousands, millions and so on: '1.23G' for 1.234e9."""
  power = min(max(0, len(str(int(number))) - 1) // 3, 4)
  return f'{number / 1000**power:.3g}{["", "k", "M", "G", "T"][power]}'


def duration(seconds: float) -> str:
  """Returns a duration as text, H:MM:SS, or '?' if it isn't finite."""
  if not math.isfinite(seconds):
    return '?'
  hours, rest = divmod(int(seconds + 0.5), 3600)
  return f'{hours}:{rest // 60:02d}:{rest % 60:02d}'


def _step(step: int, steps: int) -> str:
  return f'step {step:>{len(str(steps))}}/{steps}'
