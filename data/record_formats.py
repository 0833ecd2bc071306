"""Readers of files of records: Parquet, ArrayRecord and prepared TFDS data sets. See data/formats.py."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

from etils import epath

from betarank.data.config import DataError
from betarank.data.formats import Segment, checked_text, missing_field, sized, utf8


@dataclasses.dataclass(frozen=True)
class Parquet:
  pattern: str
  field: str
  smallest_unit = 1  # row groups

  @staticmethod
  @contextlib.contextmanager
  def _open(path: str):
    import pyarrow
    import pyarrow.parquet

    with epath.Path(path).open('rb') as file:
      try:
        yield pyarrow.parquet.ParquetFile(file)
      except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f'{path}: not a readable Parquet file ({reason}); fetch it again') from None

  def segments(self) -> list[Segment]:
    segments = []
    for path, _ in sized(self.pattern):
      with self._open(path) as file:
        if self.field not in file.schema_arrow.names:
          raise missing_field(path, self.field, file.schema_arrow.names, f'parquet:{self.pattern}')
        segments.append(Segment(path, 0, file.num_row_groups))
    return segments

  def read(self, segment: Segment) -> Iterator[str]:
    with self._open(segment.path) as file:
      groups = list(range(segment.start, segment.stop))
      for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[self.field]):
        for text in batch.column(0).to_pylist():
          yield checked_text(text, lambda: segment.path, self.field)


def _records(path: str):
  """An open ArrayRecord reader. Raises DataError if the file is cut short or is something else."""
  from array_record.python import array_record_module

  reader = array_record_module.ArrayRecordReader(path, 'readahead_buffer_size:0')
  if not reader.ok():
    raise DataError(f'{path}: cut short, or not an ArrayRecord file; fetch it again')
  return reader


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
  pattern: str
  smallest_unit = 4096

  def segments(self) -> list[Segment]:
    if '://' in self.pattern:
      raise DataError(f'{self.pattern}: ArrayRecord is read from disks only; mount the bucket or copy it')
    segments = []
    for path, _ in sized(self.pattern):
      reader = _records(path)
      segments.append(Segment(path, 0, reader.num_records()))
      reader.close()
    return segments

  def read(self, segment: Segment) -> Iterator[str]:
    reader = _records(segment.path)
    for start in range(segment.start, segment.stop, 64):
      stop = min(start + 64, segment.stop)
      try:
        records = reader.read(list(range(start, stop)))
      except (RuntimeError, IndexError) as error:
        at = f'{segment.path}: records {start} to {stop}'
        raise DataError(f'{at} are damaged ({error}); fetch the file again') from None
      for i, record in enumerate(records, start):
        yield utf8(record, segment.path, f'record {i}, ')
    reader.close()


@contextlib.contextmanager
def _no_foreign_features():
  """TFDS imports whatever module a features.json names, so that data could run code: here it knows its own alone."""
  import tensorflow_datasets as tfds

  connector = tfds.features.FeatureConnector
  find = connector.__dict__['cls_from_name']

  def known(cls, name):
    if name not in cls._registered_features:
      raise ValueError(f'features.json names {name!r}, which is no feature of TFDS itself')
    return cls._registered_features[name]

  connector.cls_from_name = classmethod(known)
  try:
    yield
  finally:
    connector.cls_from_name = find


@functools.lru_cache(maxsize=4)
def _tfds(spec: str):
  import tensorflow_datasets as tfds

  name, _, split = spec.partition(':')
  split = split or 'train'
  try:
    with _no_foreign_features():
      if epath.Path(name).is_absolute() or name.startswith('.'):
        return tfds.builder_from_directory(name).as_data_source(split=split)
      return tfds.data_source(name, split=split, download=False)
  except Exception as error:  # TFDS raises a different type for each way in which a set can be absent
    reason = ' '.join(str(error).split())[:200]
    raise DataError(f'tfds:{spec}: can\'t be opened ({reason}); it must have been prepared by TFDS with '
                    "file_format='array_record'") from None


@dataclasses.dataclass(frozen=True)
class Tfds:
  spec: str
  field: str
  smallest_unit = 4096

  def segments(self) -> list[Segment]:
    records = _tfds(self.spec)
    features = list(records.dataset_info.features)
    if self.field not in features:
      raise missing_field(f'tfds:{self.spec}', self.field, features, f'tfds:{self.spec}')
    return [Segment(self.spec, 0, len(records))]

  def read(self, segment: Segment) -> Iterator[str]:
    records, where = _tfds(self.spec), f'tfds:{self.spec}'
    for start in range(segment.start, segment.stop, 64):
      indices = range(start, min(start + 64, segment.stop))
      try:
        found = records.__getitems__(list(indices))
      except Exception as error:  # as for _tfds: there is no type that they share
        at, reason = f'{where}: records {start} to {indices.stop}', ' '.join(str(error).split())[:200]
        raise DataError(f"{at} can't be read ({reason}); prepare the set again") from None
      for i, record in zip(indices, found):
        text = record[self.field]
        if isinstance(text, bytes):
          yield utf8(text, where, f'record {i}, ')
        else:
          yield checked_text(text, lambda: where, self.field)
