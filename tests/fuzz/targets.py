"""Collects all targets, by name."""

from tests.fuzz import inputs, templates, texts  # noqa: F401 (importing registers their targets)
from tests.fuzz.target import TARGETS, Target

__all__ = ['TARGETS', 'Target']
