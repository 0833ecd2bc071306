"""Makes hostile variants of valid bytes, text and JSON. A random generator makes all choices."""

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

NUMBERS = (0, 1, -1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
TEXTS = ('', ' ', '\0', '\n', '\r\n', 'a\nb', '\ud800', '\U0010ffff', '\u202e', '\x1b[2J', 'é' * 300, 'a' * 20_000,
         '..', '../../../../etc/passwd', '/etc/passwd', '/dev/zero', '~', '$HOME', '%s%n', '{question}',
         '{0.__class__}', '<script>alert(1)</script>', "__import__('os').system('true')", 'gs:/x', 'GS://x', 'gs://',
         'file:///etc/passwd', 'nan', '1e400', '-0', '0x10', '1_000', '٤', 'null', '[]', '__class__', 'items', 'a.b',
         'a' * 300)
_RAW = {  # {placeholder: JSON that json.dumps can't write}
  '"\ue000long"': '9' * 5000, '"\ue000deep"': '[' * 3000 + ']' * 3000,
  '"\ue000objects"': '{"a":' * 3000 + '1' + '}' * 3000,
  '"\ue000huge"': '1e999', '"\ue000cut"': '', '"\ue000wide"': '[' + '0,' * 30_000 + '0]',
}
TOKENS = (b'\0', b'\xff\xff\xff\xff', b'\n', b'\xed\xa0\x80', b'\xc0\x80', b'"', b'\\u', b'{', b'}', b'[', b']', b':',
          b',', b'NaN', b'1e999', b'9' * 400, b'[' * 500, b'../', b'PAR1', b'<!--', b'\xef\xbb\xbf')


def data(rng: random.Random, good: bytes, others: Sequence[bytes] = (), tokens: Sequence[bytes] = ()) -> bytes:
  """Returns `good` after one to six changes.

  A change concerns a bit, a byte or a length, or inserts a piece of `others` or one of `tokens`.
  """
  out = bytearray(good)
  for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
    size = len(out)
    at, end = sorted((rng.randrange(size + 1), rng.randrange(size + 1)))
    end = min(end, at + rng.choice((1, 4, 64, 4096)))
    kind = rng.randrange(9)
    if kind == 0 and size:
      out[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == 1 and size:
      out[rng.randrange(size)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    elif kind == 2:
      width = rng.choice((1, 2, 4, 8))
      out[at:at + width] = (rng.choice(NUMBERS) % 2**(8 * width)).to_bytes(width, rng.choice(('little', 'big')))
    elif kind == 3:
      del out[at:]
    elif kind == 4:
      del out[at:end]
    elif kind == 5:
      out[at:at] = out[at:end] * rng.choice((1, 2, 50))
    elif kind == 6 and others:
      other = rng.choice(others)
      start = rng.randrange(len(other) + 1)
      out[at:end] = other[start:start + rng.choice((8, 256, 65536))]
    elif kind == 7:
      out[at:end] = rng.choice((*TOKENS, *tokens))
    else:
      out[at:end] = rng.randbytes(end - at)
  return bytes(out[:2**20])


def text(rng: random.Random, good: str, words: Sequence[str] = ()) -> str:
  """Returns `good` after one to four changes: pieces are repeated, removed, or replaced by one of `words` or by hostile
  text.
  """
  for _ in range(rng.choice((1, 1, 2, 4))):
    at, end = sorted((rng.randrange(len(good) + 1), rng.randrange(len(good) + 1)))
    kind = rng.randrange(5)
    piece = rng.choice((*TEXTS, *words)) if kind < 2 else str(rng.choice(NUMBERS)) if kind == 2 else ''
    piece = good[at:end][:500] * rng.choice((2, 3, 200)) if kind == 3 else piece
    good = good[:at] + piece + good[at if kind == 0 else end:]
  return good[:100_000]


def value(rng: random.Random) -> Any:
  """Returns a value that is unlikely to be valid in a JSON document."""
  return rng.choice((
    None, True, False, 0.0, -0.0, 0.5, 1e-320, 1e308, float('nan'), float('inf'), -float('inf'), [], {}, [[]], [None],
    {'': 0}, {'a.b': 1}, {'items': 1}, 10**400, rng.choice(NUMBERS), -rng.choice(NUMBERS), rng.choice(TEXTS),
    rng.choice(tuple(_RAW))[1:-1]))


def json_text(rng: random.Random, good: Any) -> bytes:
  """Returns the JSON document `good` with one to three changed, removed or added values and keys."""
  document = copy.deepcopy(good)
  for _ in range(rng.choice((1, 1, 2, 3))):
    holder, key = _place(rng, document)
    if holder is None:
      document = value(rng)
      continue
    kind = rng.randrange(6)
    if kind < 3:
      holder[key] = value(rng)
    elif kind == 3:
      del holder[key]
    elif isinstance(holder, dict):
      holder[rng.choice(TEXTS)] = holder[key] if kind == 4 else value(rng)
    else:
      holder.insert(key, copy.deepcopy(holder[key]) if kind == 4 else value(rng))
  written = json.dumps(document, ensure_ascii=rng.random() < 0.5)
  for placeholder, raw in _RAW.items():
    for form in (placeholder, json.dumps(json.loads(placeholder))):
      written = written.replace(form, raw)
  return written.encode('utf-8', 'surrogatepass')


def _place(rng: random.Random, document: Any) -> tuple[Any, Any]:
  """Returns (a dict or list in `document`, one of its keys or indices).

  Returns (None, None) if there is none, and in 2 % of all calls.
  """
  if rng.random() < 0.02:
    return None, None
  holder, key = None, None
  node = document
  while isinstance(node, dict | list) and node:
    holder, key = node, rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    node = node[key]
    if rng.random() < 0.25:
      break
  return holder, key
