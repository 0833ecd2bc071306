"""Finds the folder in which `betarank sweep` records its points: launch writes the record, and eval reads it.

Commands that only show runs use this module too, because importing it doesn't import JAX.
"""

import os

from etils import epath


def sweep_folder(root: str | os.PathLike) -> epath.Path:
  """Returns the folder with the sweep.json of a sweep.

  This is the sweep's own folder if it is on a disk. For a folder in a bucket, it is a folder in runs/sweeps on the
  machine that launched the sweep, relative to the working directory.

  root: the sweep's folder, the --root of `betarank sweep`.
  """
  _, remote, place = str(root).partition('://')
  return epath.Path('runs/sweeps') / place if remote else epath.Path(root)
