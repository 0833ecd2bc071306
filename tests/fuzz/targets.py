"""All targets, by name."""

from tests.fuzz import inputs, texts  # noqa: F401 (they register themselves)
from tests.fuzz.target import TARGETS, Target

__all__ = ['TARGETS', 'Target']
