"""Times how fast texts become tokens, per core, relative to the `tokenizers` library alone.

    python -m benchmarks.tokenizer [--tokenizer=PATH] [--megabytes=8] [--rounds=3]

Texts are the source files of Python's standard library, cut at 64 KiB. Each round runs every variant once, with a new
tokenizer, whose cache of words is empty, and measures the CPU seconds of one thread. Two variants are the library
alone: its functions encode_batch and encode_batch_fast. Speeds are relative to the faster of these in the same round,
and the median over rounds is printed. The variant `data prepare` also reads the tokenizer, so the time that it takes
for a single short document is subtracted, and printed separately. Without --tokenizer, a byte-level BPE of 32,768
tokens is trained on the texts.
"""

import argparse
import json
import os
import pathlib
import statistics
import sysconfig
import tempfile
import time

import numpy as np

from betarank.data.config import DataConfig, SourceConfig
from betarank.data.prepare import prepare_source
from betarank.data.tokenizer import find, read_tokenizer

CUT_CHARACTERS = 2**16


def texts(megabytes: float) -> list[str]:
  """Returns source files of the standard library as texts, of at least `megabytes` MB in all if there are enough."""
  found, size = [], 0
  for path in sorted(pathlib.Path(sysconfig.get_path('stdlib')).rglob('*.py')):
    text = path.read_text(encoding='utf-8', errors='replace')
    pieces = [text[start:start + CUT_CHARACTERS] for start in range(0, len(text), CUT_CHARACTERS)]
    found, size = found + pieces, size + len(text.encode())
    if size > megabytes * 1e6:
      break
  return found


def train(documents: list[str], folder: pathlib.Path) -> str:
  """Trains a byte-level BPE on the documents and writes it to `folder`. Returns the folder."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  t = tokenizers.Tokenizer(models.BPE())
  t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  t.train_from_iterator(documents, trainers.BpeTrainer(
    vocab_size=32_768, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
    special_tokens=['<|endoftext|>']))
  t.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '<|endoftext|>'}))
  return str(folder)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tokenizer', default='', help='a tokenizer.json, or its folder')
  parser.add_argument('--megabytes', type=float, default=8.0)
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  os.environ.update(TOKENIZERS_PARALLELISM='false', RAYON_NUM_THREADS='1')
  import tokenizers

  documents = texts(args.megabytes)
  size = sum(len(text.encode()) for text in documents)
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    path = args.tokenizer or train(documents, folder)
    start = time.process_time()
    ours = read_tokenizer(path)
    print(f'{path}: {ours.vocab_size:,} tokens, read in {time.process_time() - start:.1f} CPU s; '
          f'{size / 1e6:.1f} MB in {len(documents):,} texts')
    for name, some in (('x', documents), ('one', ['short'])):
      (folder / f'{name}.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in some))
    number = iter(range(3 * args.rounds + 1))

    def prepare(file: str) -> None:
      sources = {'main': SourceConfig(f'jsonl:{folder}/{file}.jsonl', 1.0, 0)}
      config = DataConfig(str(folder / f'data{next(number)}'), path, ours.vocab_size, sources, 0.0, 1024)
      prepare_source(config, 'main', workers=1)

    theirs = lambda: tokenizers.Tokenizer.from_file(str(find(path)))
    prepared = 'data prepare, one worker'
    ways = {
      'tokenizers, encode_batch': (
        theirs, lambda t: [e.ids for e in t.encode_batch(documents, add_special_tokens=False)]),
      'tokenizers, encode_batch_fast': (
        theirs, lambda t: [e.ids for e in t.encode_batch_fast(documents, add_special_tokens=False)]),
      'read_tokenizer(...).encode': (lambda: read_tokenizer(path), lambda t: [t.encode(text) for text in documents]),
      prepared: (lambda: None, lambda _: prepare('x')),
      'its start': (lambda: None, lambda _: prepare('one')),
    }
    prepare('one')  # imports what it needs
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
      for name, (make, way) in ways.items():
        made, start = make(), time.process_time()
        way(made)
        seconds[name].append(time.process_time() - start)
  started = seconds.pop('its start')
  seconds[prepared] = [whole - one for whole, one in zip(seconds[prepared], started)]
  baseline = np.minimum(*(seconds[name] for name in list(ways)[:2]))
  for name, taken in seconds.items():
    ratio = statistics.median(baseline / np.array(taken))
    print(f'{name:30} {size / statistics.median(taken) / 1e6:6.2f} MB/s  {ratio:.2f}')
  print(f'{prepared}: {statistics.median(started):.1f} s to start')


if __name__ == '__main__':
  main()
