"""Tests that programs are compiled in another thread, that errors appear at the call, and that a process can end."""

import signal
import threading

import jax
import jax.numpy as jnp
import pytest

from betarank.runtime import ahead
from tests.compilations import compilations
from tests.runs import finish, python


def test_a_program_is_compiled_in_another_thread_and_not_again_by_its_call():
  double, square = jax.jit(lambda x: 2 * x), jax.jit(lambda x: x @ x)
  mesh = jax.make_mesh((4,), ('a',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
  rows = jax.NamedSharding(mesh, jax.P('a'))
  with jax.set_mesh(mesh), compilations() as found:
    abstract = jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=rows)
    doubled = lambda: ahead.outputs(double.lower(abstract))
    first, second = ahead.compiling(doubled, lambda: ahead.outputs(square.lower(doubled())))
    first(), second()
    assert [main for main, _ in found] == [False, False]
    x = jax.device_put(jnp.eye(4), rows)
    found.clear()
    with jax.transfer_guard('disallow'):
      square(double(x))
    assert found == []


def test_an_error_appears_at_the_call_and_the_rest_is_done(monkeypatch):
  monkeypatch.setattr(ahead, 'MIN_CORES', 1)
  def fails(x):
    raise TypeError('it can not be traced')

  program, seen = jax.jit(fails), []
  for wait in ahead.compiling(lambda: ahead.outputs(program.lower(jnp.ones(3))), lambda: seen.append(1)):
    wait()
  assert seen == [1]
  with pytest.raises(TypeError, match='it can not be traced'):
    program(jnp.ones(3))


def test_without_compilation_and_with_few_cores_nothing_is_done(monkeypatch):
  monkeypatch.setattr(ahead, 'MIN_CORES', 10**6)
  [wait] = ahead.compiling(lambda: pytest.fail('it is compiled'))
  wait()
  monkeypatch.setattr(ahead, 'MIN_CORES', 1)
  with jax.disable_jit():
    [wait] = ahead.compiling(lambda: pytest.fail('it is compiled'))
    wait()
  assert all(thread.name != 'compiling ahead' for thread in threading.enumerate())


END = """
import sys, time
from betarank import __main__
from betarank.runtime import ahead
ahead.MIN_CORES = 1
def command(argv):
  ahead.compiling(lambda: (print('begun', flush=True), time.sleep({seconds}), print('done')), lambda: print('never'))
  {then}
__main__._run = command
__main__.main()
"""


@pytest.mark.parametrize('then, status', [('pass', 0), ('sys.exit(143)', 143)])
def test_a_process_that_ends_waits_for_the_program_in_progress_only(then, status):
  process = python('-c', END.format(seconds=1, then=then))
  assert finish([process], timeout=240) == [(status, 'begun\ndone\n', '')]


def test_ctrl_c_does_not_wait_for_a_program():
  process = python('-c', END.format(seconds=600, then='time.sleep(600)'))
  assert process.stdout.readline() == 'begun\n'
  process.send_signal(signal.SIGINT)
  assert finish([process], timeout=240) == [(130, '', '\nstopped\n')]
