"""Writes profiles of chosen steps, for TensorBoard's profile page (xprof)."""

import contextlib
from collections.abc import Iterator

import jax
from etils import epath


class Profile:
  """Traces the steps from `first` to `last`, and writes the trace to WORKDIR/profile.

  The constructor's argument `steps` is (first, last), or None for no trace. The trace begins before step `first`, and
  ends when the devices have finished step `last`. Call `close` at the end of the run, which may come earlier.
  """

  def __init__(self, workdir: epath.Path, steps: tuple[int, int] | None):
    self._folder, self._steps, self._running = str(workdir / 'profile'), steps, False

  @contextlib.contextmanager
  def at(self, step: int) -> Iterator[None]:
    """Returns a context manager for the work of one step. Use it for every step.

    It starts the trace before the first step to trace, and ends the trace after the last one.
    """
    if self._steps is None:
      yield
      return
    first, last = self._steps
    if first <= step <= last and not self._running:
      jax.profiler.start_trace(self._folder)
      self._running = True
    try:
      with jax.profiler.StepTraceAnnotation('step', step_num=step):
        yield
    finally:
      if self._running and step >= last:
        jax.effects_barrier()
        for array in jax.live_arrays():
          array.block_until_ready()
        jax.profiler.stop_trace()
        self._running, self._steps = False, None

  def close(self) -> None:
    """Ends the trace if the run has ended before the last step to trace."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
