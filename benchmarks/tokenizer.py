"""Times how fast texts become prepared shards, per core, relative to the `tokenizers` library alone.

    python -m benchmarks.tokenizer [--tokenizer=PATH] [--megabytes=8] [--rounds=3]

Texts are the source files of Python's standard library, cut at 64 KiB. Four variants are timed. `prepare` does what a
worker of `betarank data prepare` does: it reads JSON Lines, tokenizes, and writes a shard. The other three (see
`variants`) only tokenize. After each 256 KiB of text, `prepare` pauses, and the others tokenize the same text, one
after the other in random order. Other jobs on the machine therefore slow all variants equally.

The benchmark measures the CPU seconds of one thread. It doesn't count the time for reading the tokenizer, nor the time
for closing a shard, which happens once per 128 MiB. In each round, every variant begins with a tokenizer whose cache of
words is empty. A ratio is a variant's speed divided by that of the library's `encode_batch_fast` for the same text. The
benchmark prints the median and the quartiles of the ratios over all texts and rounds. Without --tokenizer, a byte-level
BPE of 32,768 tokens is trained on the texts.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator

from betarank.data import worker
from betarank.data.config import DataConfig, SourceConfig
from betarank.data.tokenizer import find, read_tokenizer

PART_BYTES = 2**18
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


def parts(documents: list[str]) -> list[list[str]]:
  """Divides the documents into parts of at least PART_BYTES. Documents after the last complete part are left out.

  data/worker.py reports its progress after each of these parts, because `main` sets worker.REPORT_BYTES to PART_BYTES.
  """
  found, size = [[]], 0
  for text in documents:
    found[-1].append(text)
    size += len(text.encode())
    if size >= PART_BYTES:
      found.append([])
      size = 0
  return found[:-1]


def variants(path: str) -> dict[str, Callable[[list[str]], list]]:
  """Returns the variants that only tokenize, {name: function (texts) -> the token ids of each text}.

  Each function has a tokenizer of its own, read from `path`.
  """
  import tokenizers

  library = [tokenizers.Tokenizer.from_file(str(find(path))) for _ in range(2)]
  ours = read_tokenizer(path)
  return {
    'tokenizers, encode_batch_fast':
      lambda texts: [e.ids for e in library[0].encode_batch_fast(texts, add_special_tokens=False)],
    'tokenizers, encode_batch':
      lambda texts: [e.ids for e in library[1].encode_batch(texts, add_special_tokens=False)],
    'read_tokenizer(...).encode': lambda texts: [ours.encode(text) for text in texts],
  }


def measure(preparing: worker.Worker, ways: dict[str, Callable[[list[str]], list]], waiting: Iterator[list[str]],
            seconds: dict[str, list[float]]) -> None:
  """Times all variants in one round.

  preparing: the worker that the variant `prepare` runs.
  ways: the other variants, from `variants`.
  waiting: the parts of the documents, from `parts`.
  seconds: {variant: CPU seconds of each part}. The figures of this round are appended.
  """
  resumed = time.process_time()

  def report(_) -> None:
    nonlocal resumed
    seconds['prepare'].append(time.process_time() - resumed)
    part = next(waiting)
    for name in random.sample(list(ways), len(ways)):
      start = time.process_time()
      ways[name](part)
      seconds[name].append(time.process_time() - start)
    resumed = time.process_time()

  collections.deque(preparing.run(0, tuple(preparing.source.segments), 0, report=report), maxlen=0)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tokenizer', default='', help='a tokenizer.json, or its folder')
  parser.add_argument('--megabytes', type=float, default=8.0)
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  os.environ.update(TOKENIZERS_PARALLELISM='false', RAYON_NUM_THREADS='1')
  worker.REPORT_BYTES = PART_BYTES
  documents = texts(args.megabytes)
  seconds: dict[str, list[float]] = collections.defaultdict(list)  # of each part and round
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    path = args.tokenizer or train(documents, folder)
    vocab_size = read_tokenizer(path).vocab_size
    print(f'{path}: {vocab_size:,} tokens; {args.megabytes:.1f} MB in {len(documents):,} texts')
    (folder / 'x.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in documents))
    config = DataConfig(temporary, path, vocab_size, {'x': SourceConfig(f'jsonl:{folder}/x.jsonl', 1.0, 0)}, 0.0, 1024)
    for _ in range(args.rounds):
      measure(worker.Worker(worker.Job('x', config, temporary)), variants(path), iter(parts(documents)), seconds)
  size = sum(len(text.encode()) for part in parts(documents) for text in part)
  for name, taken in seconds.items():
    ratios = [one / other for one, other in zip(seconds['tokenizers, encode_batch_fast'], taken)]
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f'{name:30} {size * args.rounds / sum(taken) / 1e6:6.2f} MB/s  {statistics.median(ratios):.2f} '
          f'({low:.2f} to {high:.2f})')


if __name__ == '__main__':
  main()
