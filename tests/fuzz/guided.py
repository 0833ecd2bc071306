"""python -m tests.fuzz.guided TARGET [--seconds=60]

Runs cases of a target that Atheris chooses by coverage. This is for targets whose reader is betarank's own Python code,
which Atheris can instrument. Ends at the first failure, with status 77 and a traceback. Needs `pip install atheris`;
betarank itself doesn't depend on it.
"""

import argparse
import contextlib
import pathlib
import random
import sys
import tempfile

import atheris

READERS = ['betarank']
with atheris.instrument_imports(include=READERS):
  from tests.fuzz.targets import TARGETS
  from tests.fuzz.texts import ANSWERS

BYTES = ('config_file', 'hf_config', 'text', 'tokenizer_export')
# The first part of a case that isn't only bytes.
LINES = {'jsonl': False, 'tasks': 'x.jsonl', 'programs': 'x.jsonl', 'metrics': 'x.jsonl'}


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m tests.fuzz.guided', description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('target', choices=('answers', *BYTES, *LINES))
  parser.add_argument('--seconds', type=int, default=60)
  args = parser.parse_args()
  target = TARGETS[args.target]

  def case(data: bytes):
    if args.target in BYTES:
      return data
    if args.target in LINES:
      return LINES[args.target], data
    given = atheris.FuzzedDataProvider(data)
    return given.ConsumeBool(), given.ConsumeUnicode(200), given.PickValueInList(list(ANSWERS))

  def one(data: bytes) -> None:
    with contextlib.suppress(*target.errors):
      check(case(data))

  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    (folder / 'good').mkdir()
    with atheris.instrument_imports(include=READERS):
      make, check, _ = target.build(folder)
      for i in range(20):
        good = make(random.Random(i), good=True)
        check(good)
        good = good[1] if isinstance(good, tuple) else good
        (folder / 'good' / str(i)).write_bytes(good if isinstance(good, bytes) else good.encode())
    atheris.Setup([sys.argv[0], str(folder / 'good'), f'-max_total_time={args.seconds}', '-timeout=30', '-seed=1',
                   '-rss_limit_mb=4096', '-print_final_stats=1', '-verbosity=0'], one)
    atheris.Fuzz()


if __name__ == '__main__':
  main()
