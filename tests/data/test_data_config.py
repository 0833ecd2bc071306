import subprocess
import sys

import pytest

from betarank import data
from betarank.configs import common, errors
from betarank.configs.sections import section
from betarank.data.config import DataConfig, SourceConfig


def test_base_config_is_valid():
  assert isinstance(section(DataConfig, common.base().data, 'data').sources['main'], SourceConfig)


SOURCE = {'uri': 'text:x', 'weight': 1.0, 'max_documents': 0}


@pytest.mark.parametrize('key, value, message', [
  ('sequence_length', 0, 'config.data.sequence_length must be positive, got 0'),
  ('validation_fraction', 1.0, r'config.data.validation_fraction must be in \[0, 1\), got 1.0'),
  ('dir', '', 'config.data.dir must be a folder'),
  ('document_bytes', 1, 'config.data.document_bytes must be 16 or more, or 0 for the default, got 1'),
  ('sources', {}, 'config.data.sources must name one source or more, got none'),
  ('sources', {'A-b': SOURCE}, "got 'A-b'"),
  ('sources', {'a': SOURCE | {'weight': 0.0}}, 'must have a weight > 0 somewhere'),
  ('sources', {'a': SOURCE | {'uri': ''}}, 'config.data.sources.a.uri must be KIND:PATH'),
  ('sources', {'a': SOURCE | {'weight': -1.0}}, 'config.data.sources.a.weight must be'),
  ('sources', {'a': SOURCE | {'max_documents': -1}}, 'sources.a.max_documents must be >= 0'),
])
def test_values_are_checked(key, value, message):
  values = common.base().data.to_dict() | {key: value}
  with pytest.raises(errors.ConfigError, match=message):
    section(DataConfig, values, 'data')


def test_workers_do_not_import_jax():
  code = 'import sys, data, data.prepare, data.sources; assert "jax" not in sys.modules; data.TrainBatches'
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_public_names_are_there():
  assert all(getattr(data, name).__module__.startswith('betarank.data.') for name in data.__all__)
