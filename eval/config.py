"""What is evaluated, and how: a checkpoint of any stage, and section `eval`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from betarank import data, model
from betarank.configs import common, load
from betarank.configs.errors import ConfigError, UserError
from betarank.configs.sections import section
from betarank.data import DataConfig
from betarank.model import MeshConfig, ModelConfig
from betarank.runtime import checkpoint, workdir
from betarank.tasks.code_jail import JailConfig
from betarank.tasks.task_set import TaskConfig
from betarank.tasks.verifiers import ANSWER_FORMATS, VerifierConfig
from betarank.train.sampler import SamplerConfig

# Of the model: how it is computed, not what.
EVALUATOR_MAY_CHANGE = ('compute_dtype', 'attention', 'remat_policy', 'scan_layers', 'moe.kernel')


class EvalError(UserError):
  """An evaluation that can't be done. One line that names what stands in its way."""


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
  """Section `eval.probe`: which tokens are looked at."""

  rows: int
  batch_size: int
  top_k: int

  def __post_init__(self):
    for name in ('rows', 'batch_size'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be >= 1, got {getattr(self, name)}')
    if self.top_k < 0:
      raise ValueError(f'top_k must be >= 1, or 0 for the objective\'s, got {self.top_k}')


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """Section `eval.sample`: what is asked, how answers are drawn and judged."""

  seed: int
  samples: int
  problems: int
  temperature: float
  top_p: float
  top_k: int
  max_new_tokens: int
  decode_batch_size: int
  data_dir: str
  shots: int
  prompt: str
  answer_format: str
  held_out_fraction: float
  verifier: VerifierConfig

  def __post_init__(self):
    if not 0 <= self.seed < 2**32:
      raise ValueError(f'seed must be in [0, 2^32), got {self.seed}')
    if self.samples < 1:
      raise ValueError(f'samples must be >= 1, got {self.samples}')
    if self.problems < 0:
      raise ValueError(f'problems must be >= 1, or 0 for all, got {self.problems}')
    if self.shots < -1:
      raise ValueError(f'shots must be >= 0, or -1 for the paper\'s number, got {self.shots}')
    if self.answer_format and self.answer_format not in ANSWER_FORMATS:
      raise ValueError(f'answer_format must be {" or ".join(ANSWER_FORMATS)}, or empty, got {self.answer_format!r}')
    self.sampler(max_prompt_tokens=1)
    TaskConfig('jsonl:any', self.prompt, held_out_fraction=self.held_out_fraction)

  def sampler(self, max_prompt_tokens: int) -> SamplerConfig:
    return SamplerConfig(self.decode_batch_size, max_prompt_tokens, self.max_new_tokens, self.temperature, self.top_p,
                         self.top_k)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Section `eval`."""

  probe: ProbeConfig
  sample: SampleConfig
  code: JailConfig


@dataclasses.dataclass(frozen=True)
class EvalRun:
  """All that an evaluation is told."""

  model: ModelConfig
  data: DataConfig
  mesh: MeshConfig
  top_k: int  # of the head, where eval.probe.top_k leaves it open
  eval: EvalConfig


@dataclasses.dataclass(frozen=True)
class CheckpointRef:
  """A checkpoint to be evaluated.

  Attributes:
    path: the checkpoint.
    run: the workdir it is from; what is found out goes to its folder `eval`.
    step: of the run.
    meta: what the checkpoint says of itself.
  """

  path: epath.Path
  run: epath.Path
  step: int
  meta: dict[str, Any]

  def lineage(self) -> dict[str, Any]:
    """What every result says of its origin."""
    return {'checkpoint': str(self.path), 'step': self.step, 'parent': self.meta.get('parent', ''),
            'code_version': workdir.code_version()}


def find_checkpoints(path: str, every: bool = False) -> list[CheckpointRef]:
  """The checkpoint at `path`, or the newest of a workdir; with `every` all that lie beside it, oldest first.

  Raises CheckpointError where there is none, or one is damaged.
  """
  found = checkpoint.find(path)
  folder = found.parent
  paths = [found]
  if every:
    paths = [folder / str(step) for step in checkpoint.steps(folder)]
  run = folder.parent if folder.name == 'checkpoints' else folder
  metas = [checkpoint.read_meta(p) for p in paths]
  return [CheckpointRef(p, run, int(meta.get('step', p.name)), meta) for p, meta in zip(paths, metas)]


def configure(subject: CheckpointRef, spec: str = '') -> ConfigDict:
  """The checkpoint's own config with section `eval`, still open to overrides.

  spec: a config whose sections `data` and `eval` are taken instead, so that runs on different data can be asked
  about the same.
  """
  config = ConfigDict(subject.meta['config'])
  given = load.read(spec) if spec else ConfigDict()
  if spec:
    config.data = given.data
  config.eval = given.get('eval', config.get('eval', common.evaluation()))
  return config


def eval_run(config: ConfigDict, subject: CheckpointRef) -> EvalRun:
  """The checked evaluation. Raises ConfigError, one line that names the key."""
  run = EvalRun(
    model=section(ModelConfig, config.model, 'model'),
    data=section(DataConfig, config.data, 'data'),
    mesh=section(MeshConfig, config.train.mesh, 'train.mesh'),
    top_k=config.objective.top_k if 'objective' in config else 100,
    eval=section(EvalConfig, config.eval, 'eval'),
  )
  trained = section(ModelConfig, subject.meta['config']['model'], 'model')
  before, now = (load.flatten(dataclasses.asdict(c)) for c in (trained, run.model))
  for key in now:
    if before[key] != now[key] and key not in EVALUATOR_MAY_CHANGE:
      raise ConfigError(f'config.model.{key} must be {before[key]}, as {subject.path} was trained, got {now[key]}')
  asked = run.eval.sample.held_out_fraction
  kept = subject.meta['config'].get('rl', {}).get('task', {}).get('held_out_fraction', 1.0)
  if asked > kept:
    raise ConfigError(f'config.eval.sample.held_out_fraction must be at most {kept}, what {subject.run} held out of '
                      f'its RL, or it would be asked what it was trained on; got {asked}')
  return run


def make_mesh(run: EvalRun) -> Mesh:
  """The mesh that config.train.mesh makes of the devices here. Raises ConfigError if it doesn't fit them."""
  try:
    return model.make_mesh(run.mesh)
  except ValueError as error:
    raise ConfigError(f'config.train.mesh: {error}') from None


def read_tokenizer(run: EvalRun) -> data.Tokenizer:
  """Returns the run's tokenizer. Raises DataError, also if it has more tokens than the model."""
  return data.read_tokenizer(run.data.tokenizer_path, run.model.vocab_size)


def restore(run: EvalRun, subject: CheckpointRef, mesh: Mesh) -> Any:
  """The checkpoint's parameters on `mesh`. Raises CheckpointError, or ConfigError if the mesh doesn't divide them."""
  _, shapes, axes = model.abstract(run.model)
  try:
    model.check_divides(shapes, axes, mesh.shape)
  except ValueError as error:
    raise ConfigError(f'config.train.mesh: {error}') from None
  place = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
  return checkpoint.restore_weights(subject.path, jax.tree.map(place, shapes, model.shardings(mesh, axes)))[0]


def same(before: Any, now: Any, keys: Sequence[str]) -> str:
  """'' if two JSON objects agree in `keys`, else a phrase on the first difference."""
  for key in keys:
    if before.get(key) != now.get(key):
      return f'{key} = {before.get(key)!r}, now {now.get(key)!r}'
  return ''


def write_whole(path: epath.Path, text: str) -> None:
  """Writes a file so that a reader sees all of it or none."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / (path.name + '.tmp')
  temporary.write_text(text)
  temporary.replace(path)
