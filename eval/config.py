"""Defines what every evaluation needs: the checkpoint, of any stage, and the section `eval` of a config."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from betarank import data, model
from betarank.configs import common, load, settings
from betarank.configs.errors import ConfigError, UserError
from betarank.configs.sections import section
from betarank.data import DataConfig
from betarank.model import MeshConfig, ModelConfig
from betarank.runtime import checkpoint, workdir
from betarank.tasks.answers import ANSWER_FORMATS
from betarank.tasks.code_jail import JailConfig
from betarank.tasks.task_set import TaskConfig
from betarank.tasks.verifiers import VerifierConfig
from betarank.train import setup
from betarank.train.sampler import SamplerConfig


class EvalError(UserError):
  """Raised if an evaluation can't be done. The message is one line that says why."""


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
  """Section `eval.probe`: the settings of `betarank eval probe`, which measures the model's predictions on validation
  data.

  Attributes:
    rows: the number of validation rows to measure. A row is a sequence of data.sequence_length tokens.
    batch_size: the number of rows per forward pass.
    top_k: the number of most probable tokens that form the head of a distribution; 0 means the objective.top_k that the
      checkpoint was trained with.
  """

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
  """Section `eval.sample`: the problems to ask, and how answers are sampled and judged.

  configs/settings.py describes each field.
  """

  seed: int
  samples: int
  problems: int
  temperature: float
  top_p: float
  top_k: int
  max_new_tokens: int
  decode_batch_size: int
  cache_tokens: int
  decode_split: int
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
                         self.top_k, cache_tokens=self.cache_tokens, decode_split=self.decode_split)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Section `eval` of a config.

  Attributes:
    probe: settings of `betarank eval probe`.
    sample: settings of `betarank eval sample`.
    code: limits for the sandbox in which generated programs run.
  """

  probe: ProbeConfig
  sample: SampleConfig
  code: JailConfig


@dataclasses.dataclass(frozen=True)
class EvalRun:
  """All settings of an evaluation.

  Attributes:
    model: the checkpoint's model.
    data: the data and the tokenizer.
    mesh: the device mesh.
    top_k: the objective.top_k of the checkpoint, which is used where eval.probe.top_k is 0.
    eval: the section `eval`.
  """

  model: ModelConfig
  data: DataConfig
  mesh: MeshConfig
  top_k: int
  eval: EvalConfig


@dataclasses.dataclass(frozen=True)
class CheckpointRef:
  """A checkpoint to evaluate.

  Attributes:
    path: the path of the checkpoint.
    run: the workdir of the run that saved the checkpoint. Results are written to the folder `eval` in this workdir.
    step: the step of the run at which the checkpoint was saved.
    meta: the checkpoint's metadata, which records its origin (see `train.setup.lineage`).
  """

  path: epath.Path
  run: epath.Path
  step: int
  meta: dict[str, Any]

  def lineage(self) -> dict[str, Any]:
    """Returns a dict with the keys 'checkpoint', 'step', 'parent' and 'code_version', which every result file has."""
    return {'checkpoint': str(self.path), 'step': self.step, 'parent': self.meta.get('parent', ''),
            'code_version': workdir.code_version()}


def find_checkpoints(path: str, every: bool = False) -> list[CheckpointRef]:
  """Returns the checkpoint at `path` as a list of one. For a workdir, this is the newest checkpoint of the run.

  every: if True, returns all checkpoints in the folder of this checkpoint instead, oldest first.

  Raises:
    CheckpointError: there is no checkpoint, or a checkpoint is damaged.
  """
  found = checkpoint.find(path)
  folder = found.parent
  paths = [found]
  if every:
    paths = [folder / str(step) for step in checkpoint.steps(folder)]
  run = folder.parent if folder.name == 'checkpoints' else folder
  metas = [checkpoint.read_meta(p) for p in paths]
  return [CheckpointRef(p, run, int(meta.get('step', p.name)), meta) for p, meta in zip(paths, metas)]


def configure(ref: CheckpointRef, spec: str = '') -> ConfigDict:
  """Returns the checkpoint's config, to which a section `eval` is added if it has none. The config isn't locked, so
  that settings can still be overridden.

  spec: the path of a config file; '' for none. Its sections `data` and `eval`, where present, replace those of the
    checkpoint. In this way, runs that were trained on different data can be evaluated on the same data.
  """
  config = ConfigDict(setup.whole_config(ref.meta))
  given = load.read(spec) if spec else ConfigDict()
  if 'data' in given:
    config.data = given.data
  config.eval = given.get('eval', config.get('eval', common.evaluation()))
  return config


def eval_run(config: ConfigDict, ref: CheckpointRef) -> EvalRun:
  """Checks the settings of an evaluation, and returns them as dataclasses.

  config: the settings, from `configure`.
  ref: the checkpoint.

  Raises:
    ConfigError: a setting is invalid or doesn't fit the checkpoint. The message names the setting.
  """
  run = EvalRun(
    model=section(ModelConfig, config.model, 'model'),
    data=section(DataConfig, config.data, 'data'),
    mesh=section(MeshConfig, config.train.mesh, 'train.mesh'),
    top_k=config.objective.top_k if 'objective' in config else settings.default('objective.top_k'),
    eval=section(EvalConfig, config.eval, 'eval'),
  )
  trained = section(ModelConfig, ref.meta['config']['model'], 'model')
  before, now = (load.flatten(dataclasses.asdict(c)) for c in (trained, run.model))
  for key in now:
    if before[key] != now[key] and settings.role(f'model.{key}') != settings.EXECUTION:
      raise ConfigError(f'config.model.{key} must be {before[key]}, as {ref.path} was trained, got {now[key]}')
  return run


def make_mesh(run: EvalRun, key: str, rows: int) -> Mesh:
  """Returns the mesh that config.train.mesh describes, over all devices.

  key: the name of the setting that gives `rows`, for error messages.
  rows: the batch size, which must be divisible over the mesh.

  Raises:
    ConfigError: the mesh doesn't fit the number of devices, it doesn't divide the model's arrays or the rows evenly, or
      the model's attention runs only on a GPU.
  """
  return setup.make_mesh(run.mesh, run.model, {key: (rows, 1)})


def read_tokenizer(run: EvalRun, ref: CheckpointRef) -> data.Tokenizer:
  """Returns the tokenizer that the settings name.

  Raises:
    DataError: the tokenizer can't be read.
    ConfigError: the checkpoint was trained with another tokenizer.
  """
  return setup.read_tokenizer(run.data.tokenizer_path, run.model, ref.meta)


def restore(run: EvalRun, ref: CheckpointRef, mesh: Mesh) -> Any:
  """Returns the checkpoint's parameters, sharded over `mesh`. Raises CheckpointError if they can't be restored."""
  _, shapes, axes = model.abstract(run.model)
  place = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
  return checkpoint.restore_weights(ref.path, jax.tree.map(place, shapes, model.shardings(mesh, axes)))[0]


def difference(before: Any, now: Any, keys: Sequence[str]) -> str:
  """Compares two JSON objects, and describes the first of `keys` whose values differ, such as 'n = 8, now 16'.

  Returns '' if the values of all keys are equal.
  """
  for key in keys:
    if before.get(key) != now.get(key):
      return f'{key} = {before.get(key)!r}, now {now.get(key)!r}'
  return ''
