"""Registers targets. A target is a reader of input, and a way to make cases for it."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

Make, Check = Callable[..., Any], Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Target:
  """A reader of input, and how to make cases for it.

  Attributes:
    name: the name of the target.
    weight: the target's share of all cases, relative to other targets. It is larger if cases take little time.
    build: a function (folder) -> (make, check, close). make(random, good=False) returns a case. check(case) reads the
      case as a command would. close() ends what build has started.
    errors: the documented errors for input that can't be used.
    deadline_s: the most seconds that a case may take.
    strategy: a function that returns a Hypothesis strategy for some of the cases; None if there is none.
  """

  name: str
  weight: int
  build: Callable[[pathlib.Path], tuple[Make, Check, Callable[[], None]]]
  errors: tuple[type[BaseException], ...]
  deadline_s: float
  strategy: Callable[[], Any] | None


TARGETS: dict[str, Target] = {}


def target(weight: int, *errors: type[BaseException], deadline_s: float = 30.0,
           strategy: Callable[[], Any] | None = None):
  def register(build):
    TARGETS[build.__name__] = Target(build.__name__, weight, build, errors, deadline_s, strategy)
    return build
  return register


def nothing() -> None:
  pass
