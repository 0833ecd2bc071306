"""Runs a sweep on another engine, such as Slurm or GKE. A template turns each point of the sweep (one betarank command)
into a command of the engine.

    betarank sweep --config=FILE --root=DIR --on='bash launch/examples/slurm.sh {name} {command}'

The template is split into words like a shell command, but variables, pipes and other features of a shell don't work.
Then four placeholders are replaced. {command} becomes the betarank command of the point, as one word. {name} becomes a
name for the job, which stays the same if the sweep is launched again. {chips} becomes the number that --chips gives for
the point's stage. {slot} becomes a number from 0 to --parallel - 1 that differs from that of every other running point.

The sweep itself runs the points in order, records their states, and resumes them. The template's command must therefore
behave like the point's own command: wait until the job has ended, exit with the job's status, and on SIGTERM ask the
job to save and stop.
"""

import hashlib
import pathlib
import re
import shlex
from collections.abc import Callable, Sequence

from betarank.configs.errors import ConfigError, suggestion
from betarank.launch.points import BETARANK, STAGES, Point

PLACEHOLDERS = ('{command}', '{name}', '{chips}', '{slot}')


def command(template: str, chips: Sequence[str]) -> Callable[[Point, int], list[str]]:
  """Returns a function (point, slot) -> command. The command, a list of words, runs the point on the engine.

  A point that prepares data runs on this machine instead.

  template: the value of --on.
  chips: the values of --chips. 'N' is for all stages, 'STAGE=N' for one stage.

  Raises:
    ConfigError: the template can't be used.
  """
  try:
    words = shlex.split(template)
  except ValueError as error:
    raise ConfigError(f'--on={template}: {str(error).lower()}') from None
  used = re.findall(r'\{\w+\}', template)
  for placeholder in used:
    if placeholder not in PLACEHOLDERS:
      raise ConfigError(f'--on={template}: {placeholder} is not one of {", ".join(PLACEHOLDERS)}'
                        f'{suggestion(placeholder, PLACEHOLDERS)}')
  if '{command}' not in used:
    raise ConfigError(f'--on={template}: must be local, tpu, or a command with {{command}} in it')
  chips_of = _read_chips(chips)

  def run(point: Point, slot: int) -> list[str]:
    if point.stage == 'data':
      return [*BETARANK, *point.arguments]
    values = {'{command}': shlex.join(['betarank', *point.arguments]), '{name}': job_name(point),
              '{slot}': str(slot)}
    if '{chips}' in used:
      number = chips_of.get(point.stage, chips_of.get(''))
      if number is None:
        raise ConfigError(f'--on={template}: {{chips}} needs --chips=N or --chips={point.stage}=N')
      values['{chips}'] = str(number)
    return [re.sub(r'\{\w+\}', lambda match: values[match[0]], word) for word in words]

  return run


def _read_chips(flags: Sequence[str]) -> dict[str, int]:
  """Returns {stage: number of chips} from the values of --chips. The key of a number without a stage is ''."""
  found = {}
  for flag in flags:
    stage, _, number = flag.rpartition('=')
    if not re.fullmatch(r'[1-9]\d*', number) or stage not in ('', *STAGES):
      raise ConfigError(f'--chips={flag}: must be a number, or STAGE=NUMBER with one of {", ".join(STAGES)}')
    found[stage] = int(number)
  return found


def job_name(point: Point) -> str:
  """Returns a name for the job of a point. Different points and different roots get different names.

  The name has at most 50 characters, which are lower-case letters, digits and hyphens, because Kubernetes allows no
  other characters.
  """
  root = point.workdir if '://' in point.workdir else pathlib.Path(point.workdir).absolute()
  tail = hashlib.sha256(f'{root}\n{point.name}'.encode()).hexdigest()[:8]
  readable = re.sub(r'[^a-z0-9]+', '-', point.name.lower()).strip('-')
  return f'{"" if readable[:1].isalpha() else "p-"}{readable}'[:40].rstrip('-') + f'-{tail}'
