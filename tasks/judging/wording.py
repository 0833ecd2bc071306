"""Handles words in answers: phrases around a value, numbers in words, names of the empty set and of all real numbers.
"""

import itertools
from collections.abc import Sequence

from betarank.tasks.judging.latex import is_word, match_of, spelled

# Words that may come before an answer, without changing it.
_LEAD = {
  'the', 'final', 'answer', 'answers', 'is', 'are', 'so', 'thus', 'hence', 'therefore', 'we', 'get', 'have', 'equals',
  'equal', 'to', 'it', 'its', 'result', 'value', 'values', 'solution', 'solutions', 'that', 'this', 'correct',
  'exact', 'number', 'option', 'choice', 'be', 'must', 'there', 'a', 'an', 'of', 'possible', 'set', 'roots', 'root',
  'then', 'by', 'which', 'integer', 'integers',
}
# _INTRODUCING: words after which a sentence states the answer. _CHANGING: words that change its meaning.
_INTRODUCING = {
  'is', 'are', 'equals', 'be', 'that', 'get', 'have', 'find', 'obtain', 'therefore', 'thus', 'hence', 'then',
}
_CHANGING = {
  'not', 'no', 'never', 'cannot', 'wrong', 'incorrect', 'false', 'less', 'more', 'than', 'least', 'most', 'greater',
  'fewer', 'between', 'or', 'if', 'unless', 'except', 'neither', 'nor', 'either', 'twice', 'half', 'double', 'minus',
  'plus', 'over', 'under', 'below', 'above', 'opposite', 'negative', 'reciprocal', 'inverse', 'times', 'without',
  'excluding', 'but', 'maybe', 'perhaps', 'other', 'another', 'wasn', 'isn',
}
_FOLLOWING = {
  'is', 'are', 'the', 'our', 'final', 'answer', 'answers', 'solution', 'solutions', 'result', 'correct', 'only',
  'required', 'value', 'desired', 'this', 'a', 'an',
}
_EXPLAINING = {'where', 'if', 'when', 'for', 'such', 'is', 'are', 'any', 'arbitrary', 'every', 'with', 'iff'}
_CONCLUDED = {'answer', 'answers', 'solution', 'solutions', 'result'}
_EDGES = {'.', ',', ';', ':', '"', '\\\\', '`'}

EMPTY_SET = {
  r'\emptyset', 'no solution', 'no solutions', 'no real solution', 'no real solutions', 'empty set', 'empty', 'none',
  'null set', 'no roots', 'no real roots', 'no such x', 'no such number', 'no such numbers', 'no solution exists',
  'no solutions exist', 'no values', 'no x', 'has no solution', 'has no solutions', 'no value', 'no integers',
  'no integer solution', 'no integer solutions', 'no such numbers exist', 'no such x exists', 'no real numbers',
  'no real number', 'no such values',
}
ALL_REALS = {r'\mathbb{R}', 'all real numbers', 'all reals', 'real numbers', 'all real x', 'any real number',
             'all real values', 'reals', 'every real number', 'all real values of x', 'all x', 'all values of x'}
_SMALL = {word: i for i, word in enumerate((
  'zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten', 'eleven', 'twelve', 'thirteen',
  'fourteen', 'fifteen', 'sixteen', 'seventeen', 'eighteen', 'nineteen'))}
_TENS = {'twenty': 20, 'thirty': 30, 'forty': 40, 'fifty': 50, 'sixty': 60, 'seventy': 70, 'eighty': 80, 'ninety': 90}
_SCALES = {'thousand': 10**3, 'million': 10**6, 'billion': 10**9, 'trillion': 10**12}
# These words after a number are a factor, as in 1.5 million.
POWERS_OF_TEN = {"'tens": 1, "'hundred": 2, "'thousand": 3, "'million": 6, "'billion": 9, "'trillion": 12,
                 "'hundreds": 2, "'thousands": 3, "'millions": 6, "'billions": 9, "'trillions": 12}


def number_in_words(words: list[str]) -> int | None:
  """Returns the number that words such as ['twenty-one'] or ['three', 'hundred'] stand for; None for other words."""
  total, current, known = 0, 0, False
  for word in itertools.chain.from_iterable(word.lower().split('-') for word in words):
    if word == 'and' and known:
      continue
    if word in _SMALL or word in _TENS:
      current += _SMALL.get(word, _TENS.get(word, 0))
    elif word == 'hundred' and current:
      current *= 100
    elif word in _SCALES and current:
      total, current = total + current * _SCALES[word], 0
    else:
      return None
    known = True
  return total + current if known else None


def names_empty_set(tokens: list[str]) -> bool:
  """Returns True if the tokens are a name of the empty set."""
  return tokens == [r'\{', r'\}'] or (r'\{' not in tokens and spelled(tokens) in EMPTY_SET)


def trim(tokens: list[str]) -> list[str]:
  """Returns the tokens without what surrounds the answer: braces, full stops, 'The answer is', '... is the answer'."""
  while tokens:
    if tokens[-1] in _EDGES and tokens[-3:] != ['.'] * 3:  # ... means that decimals repeat
      tokens = tokens[:-1]
    elif tokens[0] in {*_EDGES, '=', r'\approx'} and len(tokens) > 1:
      tokens = tokens[1:]
    elif _wrapped(tokens):
      tokens = tokens[1:-1]
    elif begin := _introduction(tokens):
      tokens = tokens[begin:]
    elif end := _conclusion(tokens):
      tokens = tokens[:-end]
    else:
      break
  return tokens


def _wrapped(tokens: list[str]) -> bool:
  """Returns True if the tokens are in braces or in bold type.

  Bold type is **...** in Markdown, which `tokenize` has turned into ^...^.
  """
  if tokens[0] == '{':
    return match_of(tokens, 0) == len(tokens) - 1
  return tokens[0] == '^' == tokens[-1] and len(tokens) > 2


def _word(token: str) -> str:
  return token[1:].lower() if is_word(token) else ''


def _introduction(tokens: list[str]) -> int:
  """Returns the number of tokens that introduce the answer.

  An introduction is either words such as 'The answer is', or a whole sentence that ends in such words. A sentence
  doesn't count if one of its words could change the meaning of the answer, such as 'not' or 'half'.
  """
  lead = len(list(itertools.takewhile(lambda t: _word(t) in _LEAD, tokens)))
  if lead:
    return lead if lead < len(tokens) else 0
  prose = list(itertools.takewhile(lambda t: is_word(t) or t == ':' or (t.isalpha() and len(t) == 1), tokens))
  words = [_word(t) for t in prose]
  if any(word in _CHANGING or word.endswith("n't") for word in words) or not any(words):
    return 0
  ends = [i for i, t in enumerate(prose) if words[i] in _INTRODUCING or (t == ':' and len(words[0]) > 1)]
  return ends[-1] + 1 if ends and ends[-1] + 1 < len(tokens) else 0


def _conclusion(tokens: list[str]) -> int:
  """Returns the number of tokens at the end that only say that this is the answer, as in '5 is the answer'."""
  words = list(itertools.takewhile(lambda t: _word(t) in _FOLLOWING, reversed(tokens)))
  said = [_word(t) for t in words]
  concludes = said and said[-1] in ('is', 'are') and _CONCLUDED & set(said)
  return len(words) if concludes and len(words) < len(tokens) else 0


def is_plain_words(tokens: list[str]) -> bool:
  """Returns True if the tokens are only words and punctuation."""
  return any(is_word(t) for t in tokens) and all(
    is_word(t) or t in ('(', ')', '.', "'", '-', '"', '!', '?') for t in tokens)



def is_name(tokens: Sequence[str]) -> bool:
  """Returns True if the tokens are a name of at most six words, such as the name of a person, a colour or a direction.
  """
  words = [_word(t) for t in tokens if is_word(t)]
  return 0 < len(words) <= 6 and is_plain_words(list(tokens)) and not _EXPLAINING & set(words)
