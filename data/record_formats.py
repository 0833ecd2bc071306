"""Readers of record files: Parquet, ArrayRecord and prepared TFDS data sets. See data/formats.py."""

import contextlib
import dataclasses
import difflib
import functools
import io
from collections.abc import Iterator

from etils import epath

from betarank.configs.errors import one_line
from betarank.data import files
from betarank.data.config import DataError
from betarank.data.fields import BadValue, Fields, missing_field
from betarank.data.formats import FileReader, Row, Segment

_READ_AT_ONCE = 64  # records are read in groups of so many
_RECORD_BYTES = 4096.0  # assumed size of a TFDS record


@contextlib.contextmanager
def _parquet(path: str):
  import pyarrow
  import pyarrow.parquet

  with files.opened(path) as file:
    try:
      yield pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
      reason = str(error).splitlines()[0]
      raise DataError(f'{path}: not a readable Parquet file ({reason}); fetch it again') from None


class _NoData(io.RawIOBase):
  """A file object that seems large, but from which nothing can be read. `asked` is True after an attempt to read."""

  size, at, asked = 2**62, 0, False

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    self.at = offset + (0, self.at, self.size)[whence]
    return self.at

  def tell(self) -> int:
    return self.at

  def read(self, size: int = -1) -> bytes:
    self.asked = True
    return b''


def _text_bytes(metadata, names: tuple[str, ...]) -> int:
  """Returns the decompressed size of the columns `names` in bytes, according to the metadata of a Parquet file.

  If the metadata of a column in a row group is damaged, Arrow throws a C++ exception when it first uses this metadata.
  pyarrow (version 26) turns the exception into a Python error when it reads the column. It doesn't do so in its method
  `column`, where the exception would end the process. So each column is first read from a file without data. If Arrow
  asks for the data, the metadata isn't damaged.

  Raises:
    pyarrow.ArrowException or OSError: the metadata is damaged.
  """
  import pyarrow
  import pyarrow.parquet

  outer = tuple(name.partition('.')[0] for name in names)
  columns = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path.partition('.')[0] in outer]
  no_data, size = _NoData(), 0
  reader = pyarrow.parquet.ParquetFile(no_data, metadata=metadata).reader
  for group in range(metadata.num_row_groups):
    for i in columns:
      no_data.asked = False
      try:
        reader.read_row_group(group, [i], use_threads=False)
      except (pyarrow.ArrowException, OSError):
        if not no_data.asked:
          raise
      size += metadata.row_group(group).column(i).total_uncompressed_size
  return max(1, size)  # a damaged file may say anything


@dataclasses.dataclass(frozen=True)
class Parquet(FileReader):
  """A reader of Parquet files, in which each row is a document."""

  pattern: str
  fields: Fields
  suffixes = ('.parquet', '.pq')

  def segments(self) -> list[Segment]:
    return files.in_parallel(self._segment, self.found.files)

  def _segment(self, file: files.File) -> Segment:
    if file.size is None:
      raise DataError(f'{file.path}: the server doesn\'t say how long the file is, and Parquet is read from its end; '
                      'copy it to a disk or a bucket')
    with _parquet(file.path) as parquet:
      present = parquet.schema_arrow
      for name in self.fields.names:
        outer, *inner = [name] if name in present.names else name.split('.')
        if outer not in present.names:
          raise missing_field(file.path, name, present.names, f'parquet:{self.pattern}')
        kind = present.field(present.names.index(outer)).type
        for part in inner:
          here = [kind.field(i).name for i in range(kind.num_fields)]
          if part not in here:
            raise missing_field(file.path, name, [f'{outer}.{other}' for other in here] or present.names,
                                f'parquet:{self.pattern}')
          outer, kind = f'{outer}.{part}', kind.field(part).type
      groups, size = parquet.num_row_groups, _text_bytes(parquet.metadata, self.fields.names)
      return Segment(file.path, 0, groups, item_bytes=size / max(groups, 1))

  def read(self, segment: Segment) -> Iterator[Row]:
    with _parquet(segment.path) as parquet:
      row = sum(parquet.metadata.row_group(i).num_rows for i in range(segment.start))
      groups = list(range(segment.start, segment.stop))
      for batch in parquet.iter_batches(batch_size=1024, row_groups=groups, columns=list(self.fields.names)):
        for record in batch.to_pylist():
          try:
            yield self.fields.document(record)
          except BadValue as error:
            yield DataError(f'{segment.path}: row {row}: {error}')
          row += 1


def _records(path: str):
  """Returns an open reader of an ArrayRecord file. Raises DataError if the file is truncated or has another format."""
  from array_record.python import array_record_module

  reader = array_record_module.ArrayRecordReader(path, 'readahead_buffer_size:0')
  if not reader.ok():
    raise DataError(f'{path}: cut short, or not an ArrayRecord file; fetch it again')
  return reader


@dataclasses.dataclass(frozen=True)
class ArrayRecord(FileReader):
  """A reader of ArrayRecord files, in which each record is a document in UTF-8."""

  pattern: str
  suffixes = ('.array_record', '.arrayrecord')

  def segments(self) -> list[Segment]:
    if '://' in self.pattern and not self.pattern.startswith('gs://'):
      raise DataError(f'{self.pattern}: ArrayRecord is read from disks and gs:// only; copy it there')
    return files.in_parallel(self._segment, self.found.files)

  @staticmethod
  def _segment(file: files.File) -> Segment:
    reader = _records(file.path)
    count = reader.num_records()
    reader.close()
    return Segment(file.path, 0, count, item_bytes=file.size / max(count, 1))

  def read(self, segment: Segment) -> Iterator[Row]:
    reader = _records(segment.path)
    for start in range(segment.start, segment.stop, _READ_AT_ONCE):
      stop = min(start + _READ_AT_ONCE, segment.stop)
      try:
        records = reader.read(list(range(start, stop)))
      except (RuntimeError, IndexError) as error:
        at = f'{segment.path}: records {start} to {stop}'
        raise DataError(f'{at} are damaged ({error}); fetch the file again') from None
      for i, record in enumerate(records, start):
        try:
          yield record.decode()
        except UnicodeDecodeError as error:
          yield DataError(f'{segment.path}: record {i}: not UTF-8 at byte {error.start}; convert the file')
    reader.close()


@contextlib.contextmanager
def _no_foreign_features():
  """Makes TFDS refuse, inside the block, all feature types that aren't its own.

  TFDS imports any module that features.json names, so a malicious data set could run code.
  """
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
  folder = epath.Path(name).is_absolute() or name.startswith('.')
  try:
    with _no_foreign_features():
      if folder:
        return tfds.builder_from_directory(name).as_data_source(split=split)
      return tfds.data_source(name, split=split, download=False)
  except Exception as error:  # TFDS raises many different types if a set is missing
    if folder:
      raise DataError(f"tfds:{spec}: can't be opened ({one_line(error)[:200]}); it must have been prepared by TFDS "
                      "with file_format='array_record'") from None
    raise DataError(f'tfds:{spec}: {_how_to_get(name, one_line(error))}') from None


def _how_to_get(name: str, reason: str) -> str:
  import tensorflow_datasets as tfds

  base = name.partition('/')[0]
  known = tfds.list_builders(with_community_datasets=False)
  if base in known:
    place = tfds.core.constants.DATA_DIR
    return (f'not on this machine (in {place}, or where TFDS_DATA_DIR says); prepare it once: '
            'python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder('{name}', file_format='array_record').download_and_prepare()\", which may need "
            'pip install tensorflow apache-beam')
  near = difflib.get_close_matches(base, known, n=1)
  return (f'TFDS has no set of this name that it can make ({reason[:150]}); '
          + (f'did you mean {near[0]}? ' if near else '') + 'Name the folder of a prepared set, '
          'tfds:/PATH/NAME/VERSION, or Parquet files such as those of Hugging Face, parquet:hf://datasets/ORG/NAME')


@dataclasses.dataclass(frozen=True)
class Tfds:
  """A reader of TFDS data sets, in which each example is a document."""

  spec: str
  fields: Fields

  def segments(self) -> list[Segment]:
    records = _tfds(self.spec)
    features = list(records.dataset_info.features)
    for name in self.fields.names:
      if name.partition('.')[0] not in features:
        raise missing_field(f'tfds:{self.spec}', name, features, f'tfds:{self.spec}')
    return [Segment(self.spec, 0, len(records), item_bytes=_RECORD_BYTES)]

  def read(self, segment: Segment) -> Iterator[Row]:
    records, where = _tfds(self.spec), f'tfds:{self.spec}'
    for start in range(segment.start, segment.stop, _READ_AT_ONCE):
      indices = range(start, min(start + _READ_AT_ONCE, segment.stop))
      try:
        found = records.__getitems__(list(indices))
      except Exception as error:  # as in _tfds, the errors have no common base type
        at, reason = f'{where}: records {start} to {indices.stop}', ' '.join(str(error).split())[:200]
        raise DataError(f"{at} can't be read ({reason}); prepare the set again") from None
      for i, record in zip(indices, found):
        try:
          yield self.fields.document(record)
        except BadValue as error:
          yield DataError(f'{where}: record {i}: {error}')
