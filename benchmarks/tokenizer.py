"""Times how fast texts become tokens, per core, relative to the `tokenizers` library alone.

    python -m benchmarks.tokenizer [--tokenizer=PATH] [--megabytes=8] [--rounds=3]

Texts are the source files of Python's standard library, cut at 64 KiB. Each round runs every variant once, and measures
the CPU seconds of one thread. The ratio of a round is relative to the library's faster variant in that round; the
median over rounds is printed. Without --tokenizer, a byte-level BPE of 32,768 tokens is trained on the texts.
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
  """Returns source files of the standard library, at least `megabytes` of them if there are enough."""
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
    theirs = tokenizers.Tokenizer.from_file(str(find(path)))
    (folder / 'x.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in documents))
    number = iter(range(args.rounds))

    def prepare() -> None:
      sources = {'main': SourceConfig(f'jsonl:{folder}/x.jsonl', 1.0, 0)}
      config = DataConfig(str(folder / f'data{next(number)}'), path, ours.vocab_size, sources, 0.01, 1024)
      prepare_source(config, 'main', workers=1)

    ways = {
      'tokenizers, encode_batch': lambda: [e.ids for e in theirs.encode_batch(documents, add_special_tokens=False)],
      'tokenizers, encode_batch_fast':
        lambda: [e.ids for e in theirs.encode_batch_fast(documents, add_special_tokens=False)],
      'read_tokenizer(...).encode': lambda: [ours.encode(text) for text in documents],
      'data prepare, one worker': prepare,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
      for name, way in ways.items():
        start = time.process_time()
        way()
        seconds[name].append(time.process_time() - start)
  baseline = np.minimum(*(seconds[name] for name in list(ways)[:2]))
  for name, taken in seconds.items():
    ratio = statistics.median(baseline / np.array(taken))
    print(f'{name:30} {size / statistics.median(taken) / 1e6:6.2f} MB/s  {ratio:.2f}')


if __name__ == '__main__':
  main()
