"""Imports libraries without the large dependencies that nothing here uses.

Each function returns the library. Calling it again costs nothing.
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
  """Imports reasoning-gym without matplotlib, in a second instead of two.

  Warnings about the syntax of a library that it needs, which Python shows at the first import, are left out.
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
  """Imports tensorboardX without PyTorch, which it would import if it can. That takes seconds."""
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
  """A module in which each name is None."""

  def __getattr__(self, name: str) -> Any:
    return None
