"""What a target is, and their register."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

Make, Check = Callable[..., Any], Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Target:
  """What reads input.

  weight: its share of all cases, by what one costs. build(folder) gives (make, check, close): make(random, good=False)
  is a case, check(case) reads it as a command would. errors: what it documents for input that it can't use. strategy:
  of Hypothesis, for some of the cases.
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
