"""Imports libraries without large dependencies that betarank doesn't use.

Each function returns the imported library. The second call returns it at once.
"""

import functools
import sys
import types
import warnings
from typing import Any

# What two of reasoning-gym's tasks bring in by way of a library that also draws. They draw nothing themselves.
_DRAWING = ('matplotlib', 'matplotlib.animation', 'matplotlib.collections', 'matplotlib.pyplot', 'mpl_toolkits',
            'mpl_toolkits.mplot3d')


@functools.cache
def reasoning_gym() -> types.ModuleType:
  """Imports reasoning-gym without importing matplotlib too, in one second instead of two.

  The SyntaxWarnings that Python shows when it first compiles one of reasoning-gym's dependencies are suppressed.
  """
  hidden = () if 'matplotlib' in sys.modules else _DRAWING
  sys.modules.update((name, _Placeholder(name)) for name in hidden)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', SyntaxWarning)
      import reasoning_gym
  finally:
    for name in hidden:
      del sys.modules[name]
  return reasoning_gym


@functools.cache
def tensorboardx() -> types.ModuleType:
  """Imports tensorboardX without importing PyTorch too, which takes seconds.

  tensorboardX imports PyTorch if it is installed, but works without it.
  """
  hide = 'torch' not in sys.modules
  if hide:
    sys.modules['torch'] = None  # the statement `import torch` then raises ImportError
  try:
    import tensorboardX
  finally:
    if hide:
      del sys.modules['torch']
  return tensorboardX


class _Placeholder(types.ModuleType):
  """A stand-in for a library that isn't imported. Every attribute of this module is None."""

  def __getattr__(self, name: str) -> Any:
    return None
