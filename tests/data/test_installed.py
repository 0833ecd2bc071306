"""Tests that installed text is collected once, whole, in an order that depends on its content alone."""

import gzip
import hashlib
import json
import lzma

from betarank.data import installed


def test_files_are_taken_once_and_in_the_order_of_their_hashes(tmp_path):
  text = {'a.py': 'x = 1\n' * 50, 'b/c.rst': 'manual\n' * 50, 'copy.py': 'x = 1\n' * 50, 'short.py': 'x',
          'table.txt': '0' * 300_000, 'b.so': 'y' * 500}
  for name, content in text.items():
    path = tmp_path / 'in' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
  (tmp_path / 'in' / 'latin.txt').write_bytes(b'\xe9' * 300)
  (tmp_path / 'in' / 'page.1.gz').write_bytes(gzip.compress(b'.TH page 1\n' * 40))
  found = installed.documents([str(tmp_path / 'in')])
  assert [path.rpartition('/')[2] for _, path, _ in sorted(found, key=lambda d: d[1])] == ['a.py', 'c.rst', 'page.1.gz']
  assert [sha256 for sha256, _, _ in found] == sorted(hashlib.sha256(t.encode()).hexdigest() for _, _, t in found)

  out = tmp_path / 'corpus.jsonl'
  assert installed.write(out, found, float('inf')) == (3, sum(len(t) for _, _, t in found))
  assert [json.loads(line)['text'] for line in out.read_text().splitlines()] == [t for _, _, t in found]
  assert (tmp_path / 'corpus.jsonl.sha256').read_text().splitlines()[0] == f'{found[0][0]}  {found[0][1]}'
  packed = tmp_path / 'corpus.jsonl.xz'
  assert installed.write(packed, found, len(found[0][2]))[0] == 1
  assert lzma.decompress(packed.read_bytes()) == out.read_bytes().splitlines(keepends=True)[0]
