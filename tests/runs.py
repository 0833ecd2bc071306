"""What tests of whole runs share: their environment, and what a run left behind."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath


def environment(devices=1):
  return {**os.environ, 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'}


def prepare(config, *flags):
  """`python -m data prepare` of a config, which must go well."""
  done = subprocess.run([sys.executable, '-m', 'data', 'prepare', f'--config={config}', *flags], capture_output=True,
                        text=True)
  assert done.returncode == 0, done.stderr


def metrics(workdir):
  """Every line of the run's file without what can't repeat."""
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{k: v for k, v in line.items() if not k.startswith('time/')} for line in lines]


def arrays(workdir, step):
  """All arrays of a checkpoint, by name, read without knowing what they should be."""
  path = epath.Path(workdir) / 'checkpoints' / str(step) / 'state'
  with ocp.PyTreeCheckpointer() as reader:
    shapes = reader.metadata(path).item_metadata
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    tree = reader.restore(path, restore_args=as_numpy)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
