r"""Splits an answer, in LaTeX, plain text or both, into the tokens that notation.py and expressions.py read.

A token is a string: a command (`\frac`), a number (`1234`, `0.5`, `3.2e5`), a letter (`x`), a word (`'apples`, which is
marked by the quote), or a symbol (`+`, `{`, `,`). Layout is removed: dollar signs, `\left`, fonts, thin spaces.
`1{,}000`, `1\,000` and `1 000` become one number. `1,000` becomes one number too, except in brackets, because `(1,000)`
is a pair.
"""

import itertools
import re
from collections.abc import Iterator

MAX_CHARS = 10_000
MAX_TOKENS = 4_000
MAX_DEPTH = 40  # the largest depth of nested brackets


class Unreadable(ValueError):
  """Raised for an answer that isn't well-formed. The message is a phrase with the reason, such as 'it is too long'."""


class Unsupported(Unreadable):
  """Raised for well-formed notation that this package can't read, such as an integral. math-verify may read it."""


_CHARACTERS = str.maketrans({
  '−': '-', '–': '-', '—': '-', '×': r'\times ', '÷': r'\div ', '·': r'\cdot ', '⋅': r'\cdot ', '∗': '*',
  'π': r'\pi ', 'θ': r'\theta ', 'α': r'\alpha ', 'β': r'\beta ', 'γ': r'\gamma ', 'λ': r'\lambda ', 'μ': r'\mu ',
  'σ': r'\sigma ', 'φ': r'\phi ', 'ω': r'\omega ', 'ε': r'\epsilon ', 'Δ': r'\Delta ', 'Ω': r'\Omega ',
  '∞': r'\infty ', '≤': r'\le ', '≥': r'\ge ', '⩽': r'\le ', '⩾': r'\ge ', '≠': r'\ne ', '≈': r'\approx ',
  '≡': r'\equiv ', '→': r'\to ', '⇒': r'\Rightarrow ', '⟹': r'\Rightarrow ', '∈': r'\in ', '∪': r'\cup ',
  '∩': r'\cap ', '∅': r'\emptyset ', 'ℝ': r'\mathbb{R}', 'ℤ': r'\mathbb{Z}', '√': r'\sqrt ', '°': r'^\circ ',
  '±': r'\pm ', '∓': r'\mp ', '′': "'", '’': "'", '∠': r'\angle ', '△': r'\triangle ', '⌊': r'\lfloor ',
  '⌋': r'\rfloor ', '⌈': r'\lceil ', '⌉': r'\rceil ', '⟨': '(', '⟩': ')', '∣': '|', '⊂': r'\subset ',
  '½': r'\frac{1}{2}', '⅓': r'\frac{1}{3}', '⅔': r'\frac{2}{3}', '¼': r'\frac{1}{4}', '¾': r'\frac{3}{4}',
  '⅛': r'\frac{1}{8}', '…': r'\dots ', '€': r'\euro ', '£': r'\pound ',
  '\u00a0': '~', '\u2009': '~', '\u202f': '~', '\u2002': ' ', '\u2003': ' ', '\u200b': '', '\u2061': '',
})

_DROPPED = {
  'left', 'right', 'bigl', 'bigr', 'big', 'Big', 'Bigl', 'Bigr', 'bigg', 'Bigg', 'biggl', 'biggr', 'Biggl', 'Biggr',
  'middle', 'displaystyle', 'textstyle', 'limits', 'nolimits', 'quad', 'qquad', 'thinspace', 'enspace', 'mathbf',
  'boldsymbol', 'bm', 'mathit', 'mathcal', 'mathsf', 'mathnormal', 'boxed', 'fbox', 'framebox', 'therefore', '(', ')',
  '[', ']', 'mathopen', 'mathclose', 'mathord', 'mathbin', 'ensuremath', 'allowbreak', 'null', 'hfill', 'noindent',
  'large', 'mathstrut',
}
_TEXT = {
  'text', 'textbf', 'textit', 'textrm', 'textsf', 'texttt', 'textnormal', 'mbox', 'hbox', 'mathrm', 'operatorname',
  'rm', 'bf', 'it', 'emph', 'mathop', 'underline',
}
_SAME = {
  'dfrac': r'\frac', 'tfrac': r'\frac', 'cfrac': r'\frac', 'dbinom': r'\binom', 'tbinom': r'\binom', 'geq': r'\ge',
  'leq': r'\le', 'geqslant': r'\ge', 'leqslant': r'\le', 'geqq': r'\ge', 'leqq': r'\le', 'gt': '>', 'lt': '<',
  'neq': r'\ne', 'rightarrow': r'\to', 'longrightarrow': r'\to', 'mapsto': r'\to', 'implies': r'\Rightarrow',
  'Longrightarrow': r'\Rightarrow', 'iff': r'\Leftrightarrow', 'times': r'\cdot', 'ast': r'\cdot', 'bullet': r'\cdot',
  'div': '/', 'over': r'\over', 'varnothing': r'\emptyset', 'lbrace': r'\{', 'rbrace': r'\}', 'langle': '(',
  'rangle': ')', 'lbrack': '[', 'rbrack': ']', 'vert': '|', 'lvert': '|', 'rvert': '|', 'mid': '|', 'Vert': r'\|',
  'lVert': r'\|', 'rVert': r'\|', 'colon': ':', 'thickapprox': r'\approx', 'simeq': r'\approx', 'approxeq': r'\approx',
  'ldots': r'\dots', 'cdots': r'\dots', 'dotsc': r'\dots', 'dotsb': r'\dots', 'degree': r'\degree',
  'varepsilon': r'\epsilon', 'varphi': r'\phi', 'vartheta': r'\theta', 'widetilde': r'\tilde', 'widehat': r'\hat',
  'overrightarrow': r'\vec', 'ddots': r'\dots', 'wedge': 'and', 'vee': 'or', 'land': 'and', 'lor': 'or', 'tg': r'\tan',
  'ctg': r'\cot', 'setminus': r'\setminus', 'backslash': r'\setminus', 'imath': 'i', 'Re': r'\Re', 'tan': r'\tan',
  'lg': r'\lg', 'log': r'\log', 'bmod': r'\bmod', 'mod': r'\bmod', 'pmod': r'\pmod', 'uppi': r'\pi',
  'pounds': r'\pound',
}
FUNCTIONS = {
  'sin', 'cos', 'tan', 'cot', 'sec', 'csc', 'arcsin', 'arccos', 'arctan', 'arccot', 'sinh', 'cosh', 'tanh', 'coth',
  'arcsinh', 'arccosh', 'arctanh', 'asin', 'acos', 'atan', 'ln', 'log', 'lg', 'exp', 'gcd', 'lcm', 'max', 'min',
}
# Letters in a row that are a command without its backslash. Other runs of four letters or more are words.
_BARE = {
  **{name: '\\' + name for name in FUNCTIONS - {'max', 'min'}}, 'sqrt': r'\sqrt', 'pi': r'\pi', 'theta': r'\theta',
  'infinity': r'\infty', 'Infinity': r'\infty', 'infty': r'\infty', 'inf': r'\infty', 'oo': r'\infty', 'mod': r'\bmod',
  'alpha': r'\alpha', 'beta': r'\beta', 'lambda': r'\lambda', 'frac': r'\frac', 'cdot': r'\cdot',
}
_WORDS = {
  'or', 'and', 'no', 'No', 'is', 'not', 'are', 'for', 'the', 'The', 'all', 'any', 'yes', 'Yes', 'one', 'two', 'six',
  'ten', 'odd', 'DNE', 'min', 'max', 'mph', 'MPH', 'kph', 'day', 'kHz', 'MHz', 'mol', 'keV', 'MeV', 'kPa', 'rad', 'deg',
  'usd', 'USD', 'pct', 'per', 'but',
}
# _UNITS are words only after a number, _NOUNS only after a number and a space, and _PROSE only among other words.
# Elsewhere their letters are variables: 3 cup is a quantity, 3 abc is a product.
_UNITS = {
  'cm', 'km', 'mm', 'dm', 'nm', 'kg', 'mg', 'ft', 'mi', 'hr', 'lb', 'oz', 'Hz', 'kJ', 'kW', 'kN', 'Pa', 'eV', 'ms',
  'ml', 'mL', 'yd', 'in', 'am', 'pm', 'AU', 'sq', 'cu', 'gal', 'amu', 'lbs', 'hrs', 'yrs', 'yds', 'kgs', 'kms', 'cms',
}
_NOUNS = {
  'yr', 'men', 'man', 'cup', 'box', 'bag', 'can', 'jar', 'jug', 'pie', 'egg', 'pen', 'car', 'bus', 'van', 'dog', 'cat',
  'pig', 'cow', 'hen', 'fox', 'bee', 'ant', 'boy', 'kid', 'toy', 'hat', 'cap', 'gem', 'key', 'tie', 'bar', 'row', 'lap',
  'ton', 'nut', 'job', 'age', 'way', 'win', 'pts', 'pcs',
}
_PROSE = {'so', 'So', 'it', 'It', 'of', 'to', 'in', 'at', 'we', 'We', 'if', 'an', 'as', 'be', 'by', 'our', 'its', 'sum',
          'has'}
_COMMANDS = _DROPPED | _TEXT | _SAME.keys() | FUNCTIONS | {
  'frac', 'sqrt', 'pi', 'infty', 'cup', 'le', 'ge', 'in', 'pm', 'cdot', 'times', 'theta', 'alpha', 'circ', 'binom'}
_SPACE = r'(?:\{,\}|,\\!\s*|\\[,;:! ]|~|\s)'  # can separate groups of three digits
_TOKEN = re.compile(
  rf'(?P<space>(?:\s|~|\\[,;:!\s/]|\\q?quad)+)'
  rf'|(?P<grouped>[1-9]\d{{0,2}}(?:{_SPACE}\d{{3}})+(?!\d)(?:\.\d+)?)'
  r'|(?P<number>\d+(?:\{,\}\d+|\.(?!\.)\d*)?|\.\d+)'
  r'(?P<exponent>[eE][+-]?\d+(?![\d.]*[A-Za-z({^!]))?'
  r'|(?P<command>\\(?:[A-Za-z]+\*?|\\\[[\d.]+[a-z]{2}\]|.))'
  r'|(?P<dotted>(?:[A-Za-z]\.){2,})'
  r'|(?P<letters>[A-Za-z]+)'
  r'|(?P<other>\*\*|.)', re.ASCII | re.DOTALL)
_TIGHT = ',,'  # a comma right before a digit
_THOUSANDS = re.compile(r'[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?')
_LETTERS = re.compile('[A-Za-z]+')
_FOLLOWED = re.compile('[A-Za-z]+ [A-Za-z]{2}')
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
_TIMES_TEN = re.compile(r'(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*|\{))')
_MODULES = re.compile(r'\b(?:np|numpy|math|sympy|sp)\.(?=[a-z])')
_ASCII_OPERATORS = (('<=', r'\le '), ('>=', r'\ge '), (' != ', r' \ne '), ('==', '='), ('=>', r'\Rightarrow '),
                    ('->', r'\to '))
_DOUBLED = re.compile(r'\\\\([A-Za-z]+)')
_SUPERSCRIPTS = str.maketrans('⁰¹²³⁴⁵⁶⁷⁸⁹⁻', '0123456789-')
_RAISED = re.compile('[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+')
# In 5 m or 5 m/s, these letters at the end are a unit; 5m is a product.
_LAST_UNIT = re.compile(r'(?<=\d)(?:\s|~|\\[,;: ])+(m/s|[msgLJNWVK])(?=[\s.$]*$)')
# The choice (C) in C) 7, C. 7, **C.** 7, \textbf{C.} 7 or (C) 7. In (C)x, (C) + 1 and (N) 2, the letter is a variable.
_LABEL = re.compile(r"""
  \A((?:[A-Za-z ]{0,80}\b(?:is|answer|option|choice):?\s{1,9})?(?:\*\*)?)
  (?:([A-Z])(?:\)\s*\Z|[.)]\s+(?=\S))
  |(?:\*\*|\\textbf\{)([A-Z])[.)]\s*(?:\*\*|\})
  |\(([A-J])\)(?:\s|~|\\[,;:!\ ])+(?![\s~+*/^_<>!=,;]|\\[,;:!\ ]|-\s|(?:or|and)\b
    |\\(?:cdot|times|div|leq?|geq?|neq?|pm|mp|cup|cap|in|to|approx)\b))""", re.VERBOSE)
_LEADING_DOLLAR = re.compile(r'\s*-?\s*\$\s*[\d.]')


def is_word(token: str) -> bool:
  """Returns True if the token is a word rather than mathematics."""
  return token[:1] == "'" and len(token) > 1


def is_number(token: str) -> bool:
  """Returns True if the token is a number."""
  return token[0].isdigit() or (token[0] == '.' and len(token) > 1)


def tokenize(text: str) -> list[str]:
  """Returns the tokens of `text`. Raises Unreadable if the text is too long, or if its brackets don't match."""
  if len(text) > MAX_CHARS:
    raise Unreadable('it is too long')
  text = _RAISED.sub(lambda found: f'^{{{found[0].translate(_SUPERSCRIPTS)}}}', text)
  text = _LAST_UNIT.sub(r'\\text{\1}', _MODULES.sub('', text.translate(_CHARACTERS)))
  if r'\begin' not in text:  # the text may be escaped twice, like JSON in JSON
    text = _DOUBLED.sub(lambda found: found[0][1:] if found[1] in _COMMANDS else found[0], text)
  for written, meant in _ASCII_OPERATORS:
    text = text.replace(written, meant)
  text = text.replace(r'\$', r'\dollar ')
  if text.count('$') % 2 and _LEADING_DOLLAR.match(text):  # $5 is money, $5$ is mathematics
    text = text.replace('$', r'\dollar ', 1)
  text = _TIMES_TEN.sub(r'\\times ', _LABEL.sub(r'\1\\text{(\2\3\4)} ', text.replace('$', ' ').strip()))
  tokens: list[str] = []
  _scan(text, tokens, in_text=False)
  _match_brackets(tokens)
  return _join_thousands(tokens)


def _scan(text: str, tokens: list[str], in_text: bool) -> None:
  at = 0
  while at < len(text):
    if len(tokens) > MAX_TOKENS:
      raise Unreadable('it is too long')
    found = _TOKEN.match(text, at)
    kind, piece, at = found.lastgroup, found[0], found.end()
    if kind == 'grouped':
      tokens.append(re.sub(r'[^\d.]', '', piece))
    elif kind in ('number', 'exponent'):
      tokens.append(piece.replace('{,}', '.'))
    elif kind == 'command':
      at = _command(piece, text, at, tokens, in_text)
    elif kind == 'dotted':  # p.m.
      tokens.append("'" + piece.replace('.', '').lower())
    elif kind == 'letters':
      at = _letters(text, found.start(), tokens, in_text)
    elif piece == ',' and text[at:at + 1].isdigit():
      tokens.append(_TIGHT)
    elif kind != 'space':
      tokens.append({'**': '^', '*': r'\cdot'}.get(piece, piece))


def _letters(text: str, start: int, tokens: list[str], in_text: bool) -> int:
  r"""Appends the tokens of the letters at index `start` of `text` to `tokens`. Returns the index after these letters.

  in_text: whether the letters are in the argument of a command such as \text.
  """
  run, word = _LETTERS.match(text, start)[0], _WORD.match(text, start)[0]
  if (word if in_text else run) in _BARE:
    tokens.append(_BARE[run])
    return start + len(run)
  previous = tokens[-1] if tokens else ''
  after_number = previous in ('}', ')', "'sq") or (previous and is_number(previous))
  among_words = _FOLLOWED.match(text, start) or is_word(previous)
  noun = run in _NOUNS and after_number and (text[start - 1].isspace() or text[start - 1] == '~')
  known = run in _WORDS or (run in _UNITS and after_number) or noun or (run in _PROSE and among_words)
  of_unit = previous == '/' and is_word(''.join(tokens[-2:-1]))  # h in km/h
  if in_text or known or of_unit or (len(run) >= 4 and not run.isupper()):
    tokens.append("'" + word)
    return start + len(word)
  tokens.extend(run)
  return start + len(run)


def _join_thousands(tokens: list[str]) -> list[str]:
  """Returns the tokens with `1,234` joined to one number.

  In brackets, `(1,234)` stays a pair. Digits that aren't in groups of three, as in `1,234,5`, stay a list.
  """
  joined, stack, i = [], [], 0
  while i < len(tokens):
    token = tokens[i]
    if token in OPENING:
      stack.append(token)
    elif token in CLOSING and stack:
      stack.pop()
    end = i
    while is_number(tokens[end]) and end + 2 < len(tokens) and tokens[end + 1] == _TIGHT and is_number(tokens[end + 2]):
      end += 2
    if end > i and not (stack and stack[-1] != '{') and _THOUSANDS.fullmatch(','.join(tokens[i:end + 1:2])):
      joined.append(''.join(tokens[i:end + 1:2]))
    else:
      joined += [',' if t == _TIGHT else t for t in tokens[i:end + 1]]
    i = end + 1
  return joined


def _command(piece: str, text: str, at: int, tokens: list[str], in_text: bool) -> int:
  r"""Appends the tokens of a command and, for commands such as \text, of its argument.

  Returns the index after the command and its argument.

  piece: the command, such as \frac.
  at: the index in `text` after the command.
  in_text: whether the command is in the argument of another command such as \text.
  """
  name = piece[1:].rstrip('*')
  if name in _TEXT:
    inside, end = _group(text, at)
    if inside is None:
      return at
    stripped = inside.strip()
    if name in ('mathrm', 'rm', 'operatorname') and stripped in ('d', 'e', 'i'):
      tokens.append(stripped)
    else:
      _scan(inside, tokens, in_text=True)
    return end
  if name in ('hspace', 'vspace', 'phantom', 'hphantom', 'label', 'tag', 'color'):
    return _group(text, at)[1]
  if name in ('mathbb', 'Bbb', 'mathscr', 'mathfrak'):
    inside, end = _group(text, at)
    tokens.append(rf'\mathbb{{{(inside or "").strip()}}}')
    return end
  if name in ('begin', 'end'):
    inside, end = _group(text, at)
    tokens.append(f'{piece}{{{(inside or "").strip()}}}')
    return end
  if name in ('%', '&', '#', '_'):
    tokens.append(name)
  elif name[:1] == '\\':  # a new row, perhaps with its distance
    tokens.append(r'\\')
  elif name not in _DROPPED:
    tokens.append(_SAME.get(name, piece.rstrip('*')))
    if tokens[-1] in ('and', 'or'):
      tokens[-1] = "'" + tokens[-1]
  return at


def _group(text: str, at: int) -> tuple[str | None, int]:
  """Returns (content, end) of the group in braces at index `at`, before which there may be spaces.

  `end` is the index after the group. If there is no group, the content is None.
  """
  while at < len(text) and text[at].isspace():
    at += 1
  if text[at:at + 1] != '{':
    return None, at
  depth = 0
  for i in range(at, len(text)):
    if text[i] in '{}' and text[i - 1] != '\\':
      depth += 1 if text[i] == '{' else -1
      if not depth:
        return text[at + 1:i], i + 1
  raise Unreadable('a brace is not closed')


OPENING = {'{': '}', '(': ')', '[': ']', r'\{': r'\}', r'\lfloor': r'\rfloor', r'\lceil': r'\rceil'}
CLOSING = set(OPENING.values())


def _match_brackets(tokens: list[str]) -> None:
  """Raises Unreadable if the brackets don't match. The brackets of a half-open interval match: ( with ], and [ with ).
  """
  stack = []
  for token in tokens:
    if token in OPENING:
      stack.append(OPENING[token])
      if len(stack) > MAX_DEPTH:
        raise Unreadable('its brackets nest too deeply')
    elif token in CLOSING:
      expected = stack.pop() if stack else None
      if expected != token and {expected, token} != {')', ']'}:
        raise Unreadable(f'{token} closes nothing')
  if stack:
    raise Unreadable(f'{stack[-1]} is missing')


def match_of(tokens: list[str], start: int) -> int:
  """Returns the index of the bracket that closes the bracket at `start`."""
  depth = 0
  for i in range(start, len(tokens)):
    depth += (tokens[i] in OPENING) - (tokens[i] in CLOSING)
    if not depth:
      return i
  raise Unreadable(f'{tokens[start]} is not closed')


def at_top(tokens: list[str]) -> Iterator[int]:
  """Yields the index of each token that is outside of all brackets and environments. The brackets themselves aren't
  included.
  """
  depth = 0
  for i, token in enumerate(tokens):
    if token in OPENING or token.startswith(r'\begin{'):
      depth += 1
    elif token in CLOSING or token.startswith(r'\end{'):
      depth -= 1
    elif not depth:
      yield i


def split_at(tokens: list[str], places: list[int]) -> list[list[str]]:
  """Splits `tokens` at the indices `places`. Returns the parts, without the tokens at these indices."""
  edges = [-1, *places, len(tokens)]
  return [tokens[a + 1:b] for a, b in itertools.pairwise(edges)]


def spelled(tokens: list[str]) -> str:
  """Returns the words and symbols of an answer in lower case, without articles, brackets and punctuation."""
  words = [token[1:].lower() if is_word(token) else token for token in tokens
           if token not in OPENING and token not in CLOSING and token not in (',', '.', ';', ':', '"', '!', '?')]
  return ' '.join(word.replace('-', ' ') for word in words if word not in ('the', 'a', 'an')) if words else ''
