r"""Parses the tokens of one mathematical expression into a tree, without evaluating anything.

    parse(tokenize(r'\frac{1}{2} x^2'))      Node('mul', (Node('div', ...), Node('pow', ...)))

The parser supports the usual parts of answers: numbers, variables, arithmetic, roots, elementary functions, floors and
binomials. Other well-formed notation (integrals, sums, unknown commands) raises Unsupported, so that math-verify's
parser can be used instead.

A number next to a letter is a product; `7 8` is an error. `f(2)` is one symbol, the value of an unknown function.
`\frac{dv}{dt}`, `\dot v` and `v'` are three ways to write one symbol. `1\frac{1}{2}` is a mixed number.
"""

import re
from fractions import Fraction
from typing import Any, NamedTuple

from betarank.tasks.judging.latex import (
  CLOSING,
  FUNCTIONS,
  MAX_DEPTH,
  Unreadable,
  Unsupported,
  is_number,
  is_word,
  match_of,
)

GREEK = {
  'alpha', 'beta', 'gamma', 'delta', 'epsilon', 'zeta', 'eta', 'theta', 'iota', 'kappa', 'lambda', 'mu', 'nu', 'xi',
  'rho', 'sigma', 'tau', 'upsilon', 'phi', 'chi', 'psi', 'omega', 'Gamma', 'Delta', 'Theta', 'Lambda', 'Xi', 'Sigma',
  'Upsilon', 'Phi', 'Psi', 'Omega', 'hbar', 'ell', 'aleph', 'nabla', 'mho', 'odot', 'oplus', 'star', 'triangle',
  'angle', 'partial',
}
_ACCENTS = {'bar', 'vec', 'hat', 'tilde', 'overline', 'mathring', 'acute', 'check'}
_SHORT = {'asin': 'arcsin', 'acos': 'arccos', 'atan': 'arctan', 'lg': 'log10'}
_DOTS = {r'\dot': 1, r'\ddot': 2, r'\dddot': 3}
_NO_FACTOR = {r'\choose', r'\over', *'+-/:=<>,;|&^_!%.?"~`@#' "'", r'\dollar', r'\euro', r'\pound', '\\\\'}
_RELATIONS = {
  '=', '<', '>', r'\le', r'\ge', r'\ne', r'\approx', r'\equiv', r'\in', r'\to', r'\Rightarrow', r'\sim', r'\cong',
  r'\cup', r'\cap', r'\subset', r'\setminus', r'\pm', r'\mp',
}
MAX_DIGITS = 1000  # the largest number of digits of a literal number, and the largest value of its exponent
_MIXED = re.compile(r'(\d+) (?:\\frac (?:\{ (\d+) \} \{ (\d+) \}|(\d) ?(\d)) |(\d+) / (\d+) )')
_LITERAL = re.compile(r'(\d*)(?:(\.)(\d*))?(?:[eE]([+-]?\d+))?')


class Node(NamedTuple):
  """A node of an expression's tree: a number, a symbol, a constant (pi, e, i, infty) or an operation.

  op: 'number', 'symbol', 'constant', or the operation, such as 'add', 'pow' or 'call'.
  args: the operands of an operation, or the name of a symbol or constant. A call has the function's name and the
    operands. A number has its value as a Fraction, and its number of significant digits. This number of digits is None
    for repeating decimals, and if there is no decimal point or exponent, as in integers and mixed numbers.
  """

  op: str
  args: tuple[Any, ...] = ()


def literal(token: str) -> Node:
  """Returns the number that a token stands for, as a Node with the exact value.

  If the token has a decimal point or an exponent, the Node also has the number of significant digits: 3 for 3.20e5.
  """
  whole, point, decimals, exponent = _LITERAL.fullmatch(token).groups()
  if len(token) > MAX_DIGITS or abs(int(exponent or 0)) > MAX_DIGITS:
    raise Unreadable('a number is too long')
  value = Fraction(int((whole + (decimals or '')) or 0)) * Fraction(10) ** (int(exponent or 0) - len(decimals or ''))
  digits = len((whole + (decimals or '')).lstrip('0')) or 1
  return Node('number', (value, digits if point or exponent else None))


def parse(tokens: list[str]) -> Node:
  """Returns the tree of an expression.

  Raises:
    Unsupported: the expression has notation that only math-verify may know.
    Unreadable: the expression isn't well-formed.
  """
  parser = _Parser(tokens)
  node = parser.sum()
  if parser.at < len(tokens):
    raise Unreadable(f'{parser.next!r} is out of place')
  return node


def walk(node: Node):
  """Yields the node and all nodes below it."""
  stack = [node]
  while stack:
    node = stack.pop()
    yield node
    stack += [arg for arg in node.args if isinstance(arg, Node)]


def symbols(node: Node) -> set[str]:
  """Returns the names of the expression's variables."""
  return {n.args[0] for n in walk(node) if n.op == 'symbol'}


def precision(node: Node) -> int | None:
  """Returns the number of significant digits of the least precise decimal in the expression; None if it has no
  decimals.
  """
  return min((n.args[1] for n in walk(node) if n.op == 'number' and n.args[1] is not None), default=None)


def _joined(op: str, nodes: list[Node]) -> Node:
  return nodes[0] if len(nodes) == 1 else Node(op, tuple(nodes))


class _Parser:
  def __init__(self, tokens: list[str]):
    self.tokens, self.at = tokens, 0
    self._depth = self._bars = 0

  @property
  def next(self) -> str:
    return self.tokens[self.at] if self.at < len(self.tokens) else ''

  def _peek(self, offset: int) -> str:
    return self.tokens[self.at + offset] if self.at + offset < len(self.tokens) else ''

  def _take(self, *expected: str) -> str:
    token = self.next
    if not token or (expected and token not in expected):
      raise Unreadable(f'{expected[0] if expected else "something"} is missing')
    self.at += 1
    return token

  def _took(self, *tokens: str) -> bool:
    if self.next and self.next in tokens:
      self.at += 1
      return True
    return False

  # Sums, products, powers

  def sum(self) -> Node:
    terms = [self._product()]
    while self.next in ('+', '-'):
      negative = self._take() == '-'
      term = self._product()
      terms.append(Node('neg', (term,)) if negative else term)
    return _joined('add', terms)

  def _product(self) -> Node:
    """Parses a product or quotient, from left to right. Factors may be separated by an operator or written side by
    side.
    """
    negative = self._is_negative()
    factors = [self._mixed_number() or self._power()]
    divisions = 0
    while True:
      if self._took(r'\cdot'):
        factors.append(self._signed())
      elif self._took('/', ':'):
        divisions += 1
        factors = [Node('div', (_joined('mul', factors), self._signed()))]
      elif self._starts_factor():
        if is_number(self.next) and is_number(self.tokens[self.at - 1]):
          raise Unreadable('two numbers stand side by side')
        factors.append(self._power())
      else:
        break
      if divisions > MAX_DEPTH:
        raise Unreadable('it nests too deeply')
    node = _joined('mul', factors)
    return Node('neg', (node,)) if negative else node

  def _is_negative(self) -> bool:
    """Skips plus and minus signs. Returns True if an odd number of them are minus signs."""
    negative = False
    while self.next in ('-', '+') and self.next:
      negative ^= self._take() == '-'
    return negative

  def _signed(self) -> Node:
    return Node('neg', (self._power(),)) if self._is_negative() else self._power()

  def _mixed_number(self) -> Node | None:
    r"""Parses 1\frac{1}{2}, 1\frac12 or 1 1/2. Returns None if the tokens aren't a mixed number."""
    found = _MIXED.match(' '.join(self.tokens[self.at:self.at + 9]) + ' ') if self.next.isdigit() else None
    if found is None:
      return None
    if len(found[0]) > MAX_DIGITS:
      raise Unreadable('a number is too long')
    whole, *parts = (int(part) for part in found.groups() if part)
    if not parts[1]:
      raise Unreadable('it divides by zero')
    self.at += found[0].count(' ')
    return Node('number', (whole + Fraction(*parts), None))

  def _starts_factor(self) -> bool:
    token = self.next
    if not token or token in CLOSING or token in _NO_FACTOR or token in _RELATIONS or is_word(token):
      return token == '|' and not self._bars
    return True

  def _power(self) -> Node:
    node = self._primary()
    for _ in range(MAX_DEPTH):
      if self.next == '^':
        self.at += 1
        if self._degree():
          node = Node('degree', (node,))
          continue
        node = Node('pow', (node, self._exponent()))
      elif self._took(r'\degree'):
        node = Node('degree', (node,))
      elif self._took('!'):
        node = Node('call', ('factorial', node))
      elif self._took('%'):
        node = Node('div', (node, Node('number', (Fraction(100), None))))
      else:
        return node
    raise Unreadable('it nests too deeply')

  def _degree(self) -> bool:
    for form in (['{', r'\circ', '}'], [r'\circ'], ['{', r'\degree', '}']):
      if self.tokens[self.at:self.at + len(form)] == form:
        self.at += len(form)
        return True
    return False

  # Parts

  def _exponent(self) -> Node:
    """Parses an exponent: a group in braces, a symbol, or a number, perhaps with a minus sign.

    All digits of a number belong to the exponent: 2^10 is 1024, although LaTeX would raise only the 1.
    """
    if self._took('-'):
      return Node('neg', (self._argument(),))
    return self._argument()

  def _argument(self, digit: bool = False) -> Node:
    r"""Parses the argument of a command or of ^: a group in braces, or the next number or symbol.

    digit: whether to take only the first digit of a number, as in \frac12.
    """
    if self._took('{'):
      return self._inside('}')
    token = self.next
    if digit and token.isdigit() and len(token) > 1:
      self.tokens = [*self.tokens[:self.at], token[0], token[1:], *self.tokens[self.at + 1:]]
    return self._primary(bare=True)

  def _inside(self, *closing: str) -> Node:
    node = self.sum()
    if self._took(r'\choose'):
      node = Node('call', ('binomial', node, self.sum()))
    elif self._took(r'\over'):
      node = Node('div', (node, self.sum()))
    self._take(*closing)
    return node

  def _primary(self, bare: bool = False) -> Node:
    """Parses a number, a group in brackets, a function with its argument, or a symbol.

    bare: whether to stop after the letter of a symbol, and leave its index, primes or brackets to the caller.
    """
    self._depth += 1
    if self._depth > MAX_DEPTH:
      raise Unreadable('it nests too deeply')
    node = self._part(bare)
    self._depth -= 1
    return node

  def _part(self, bare: bool) -> Node:
    token = self.next
    if not token:
      raise Unreadable('it ends too early')
    if is_number(token):
      return self._number()
    if token in ('(', '['):
      self.at += 1
      return self._inside(')' if token == '(' else ']')
    if token == '{':
      self.at += 1
      return self._inside('}')
    if token in ('|', r'\|'):
      return self._absolute(token)
    if token in (r'\lfloor', r'\lceil'):
      self.at += 1
      return Node('call', (token[2:], self._inside(r'\rfloor' if token == r'\lfloor' else r'\rceil')))
    if token == r'\frac':
      return self._fraction()
    if token == r'\sqrt':
      return self._root()
    if token == r'\binom':
      self.at += 1
      return Node('call', ('binomial', self._argument(digit=True), self._argument(digit=True)))
    if token.startswith('\\') and token[1:] in FUNCTIONS:
      return self._function()
    if token in (r'\pi', r'\infty'):
      self.at += 1
      return Node('constant', (token[1:],))
    if token in ('e', 'i') and self._peek(1) not in ('_', "'"):
      self.at += 1
      return Node('constant', (token,))
    return self._symbol(bare)

  def _number(self) -> Node:
    token = self._take()
    if '.' in token and 'e' not in token.lower():
      repeated = self._repeated()
      if repeated:
        if len(repeated) > MAX_DIGITS:
          raise Unreadable('a number is too long')
        start = literal(token).args[0]
        places = len(token.partition('.')[2])
        tail = Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** places)
        return Node('number', (start + tail, None))
    return literal(token)

  def _repeated(self) -> str:
    r"""Parses and returns the digits that repeat, as in 0.\overline{3}, 0.\dot{3} or 0.333...; '' if no digits repeat.

    Three dots count only if a digit occurs three times before them.
    """
    if self.next in (r'\overline', r'\bar', r'\dot') and self._peek(1) == '{' and self._peek(2).isdigit() and (
        self._peek(3) == '}'):
      digits, self.at = self._peek(2), self.at + 4
      return digits
    token = self.tokens[self.at - 1]
    dots = 1 if self.next == r'\dots' else 3 if self.tokens[self.at:self.at + 3] == ['.'] * 3 else 0
    if dots:
      if not re.search(r'\.\d*(\d)\1\1$', token):
        raise Unreadable('what repeats in its decimals is not clear')
      self.at += dots
      return token[-1]
    return ''

  def _absolute(self, bar: str) -> Node:
    self.at += 1
    self._bars += 1
    node = self.sum()
    self._bars -= 1
    self._take(bar)
    return Node('call', ('abs', node))

  def _fraction(self) -> Node:
    derivative = self._derivative()
    if derivative:
      return derivative
    self.at += 1
    top = self._argument(digit=True)
    return Node('div', (top, self._argument(digit=True)))

  def _derivative(self) -> Node | None:
    r"""Parses \frac{d^2 v_o}{d t^2} as the symbol v_o''. Returns None if the fraction isn't a derivative."""
    if self._peek(1) != '{':
      return None
    middle = match_of(self.tokens, self.at + 1)
    if self.tokens[middle + 1:middle + 2] != ['{']:
      return None
    end = match_of(self.tokens, middle + 1)
    top, bottom = self.tokens[self.at + 2:middle], self.tokens[middle + 2:end]
    d = top[0] if top else ''
    if d not in ('d', r'\partial') or not bottom or bottom[0] != d or len(top) < 2:
      return None
    order, rest = 1, top[1:]
    if rest[0] == '^':
      power = [t for t in rest[1:4] if t not in ('{', '}')][:1]
      if not power or not power[0].isdigit() or len(power[0]) > 1:
        return None
      order, rest = int(power[0]), rest[4 if rest[1] == '{' else 2:]
    if not rest:
      return None
    inner = _Parser(rest)
    symbol = inner._symbol()
    if inner.at < len(rest) and rest[inner.at] != '(':
      return None
    self.at = end + 1
    return Node('symbol', (symbol.args[0] + "'" * order,))

  def _root(self) -> Node:
    self.at += 1
    degree = Node('number', (Fraction(2), None))
    if self._took('['):
      degree = self._inside(']')
    return Node('root', (self._argument(), degree))

  def _function(self) -> Node:
    name = self._take()[1:]
    base = power = None
    for _ in range(2):
      if self.next == '_':
        self.at += 1
        base = self._argument()
      elif self.next == '^' and self._peek(1) != r'\circ':
        self.at += 1
        power = self._exponent()
    if name in ('gcd', 'lcm', 'max', 'min'):
      node = Node('call', (name, *self._several()))
    else:
      argument = self._argument() if self.next in ('(', '{', '[') else self._run()
      inverse = power is not None and power == Node('neg', (Node('number', (Fraction(1), None)),))
      if inverse and name in ('sin', 'cos', 'tan', 'cot', 'sec', 'csc'):
        name, power = 'arc' + name, None
      if name in ('log', 'lg') and base is not None:
        node = Node('call', ('logarithm', argument, base))
      else:
        node = Node('call', (_SHORT.get(name, name), argument))
    return node if power is None else Node('pow', (node, power))

  def _several(self) -> list[Node]:
    opening = self._take('(', r'\{', '{')
    nodes = [self.sum()]
    while self._took(',', ';'):
      nodes.append(self.sum())
    self._take({'(': ')', '{': '}'}.get(opening, r'\}'))
    return nodes

  def _run(self) -> Node:
    r"""Parses an argument without brackets, such as 2\pi t in \sin 2\pi t.

    The argument is a product, which ends before the next function: \sin 2x \cos y means sin(2x) times cos(y).
    """
    factors = [self._mixed_number() or self._signed()]
    while self._starts_factor() and self.next[1:] not in FUNCTIONS:
      factors.append(self._power())
    return _joined('mul', factors)

  def _symbol(self, bare: bool = False) -> Node:
    """Parses a variable with its accents, index and primes. Numbers in brackets belong to the symbol too, as in f(2).

    bare: whether to leave an index, primes or brackets to the caller. For example, the exponent in x^f(2) is f alone.
    """
    token = self._take()
    primes = _DOTS.get(token, 0)
    if primes or token[1:] in _ACCENTS:
      self._depth += 1
      if self._depth > MAX_DEPTH:
        raise Unreadable('it nests too deeply')
      braces = self._took('{')
      inner = self._symbol()
      name = inner.args[0] if primes else f'{token[1:].replace("overline", "bar")}({inner.args[0]})'
      while braces and self.next != '}':
        name += self._symbol().args[0]
      if braces:
        self._take('}')
      name, own = name.rstrip("'"), len(name) - len(name.rstrip("'"))
      primes += own
    elif token.isalpha() and len(token) == 1:
      name = token
    elif token.startswith('\\') and token[1:] in GREEK:
      name = token[1:]
      if name in ('triangle', 'angle'):
        while self.next.isalpha() and len(self.next) == 1:
          name += ' ' + self._symbol().args[0]
    elif token.startswith('\\') and token not in _RELATIONS and token not in _NO_FACTOR:
      raise Unsupported(f'{token} is not known here')
    else:
      raise Unreadable(f'{token!r} is out of place')
    if bare:
      return Node('symbol', (name + "'" * primes,))
    if self._took('_'):
      name += '_' + self._index()
    primes += self._primes()
    if self.next == '_' and '_' not in name:
      self.at += 1
      name += '_' + self._index()
    name += "'" * primes
    called = self._call_of_a_number()
    return Node('symbol', (name + called,))

  def _index(self) -> str:
    if self.next == '{':
      end = match_of(self.tokens, self.at)
      inside = self.tokens[self.at + 1:end]
      self.at = end + 1
    else:
      inside = [self._take()]
    return ''.join(t.lstrip("'") for t in inside if t not in ('{', '}'))

  def _primes(self) -> int:
    count = 0
    while True:
      if self._took("'"):
        count += 1
      elif self.next == '^' and self._peek(1) == r'\prime':
        self.at, count = self.at + 2, count + 1
      elif self.next == '^' and self._peek(1) == '{' and self._peek(2) == r'\prime':
        end = match_of(self.tokens, self.at + 1)
        inside = self.tokens[self.at + 2:end]
        if set(inside) != {r'\prime'}:
          raise Unreadable('a prime is out of place')
        self.at, count = end + 1, count + len(inside)
      else:
        return count

  def _call_of_a_number(self) -> str:
    """Parses the numbers in brackets after a name. Returns '(2)' for f(2), and '(2,3)' for f(2, 3).

    Returns '' and parses nothing if no bracket follows, or if there is anything but numbers in the brackets. So
    f(x + 1) is the product of f and x + 1. If the brackets contain a comma, letters are accepted too, as in f(2, n).
    """
    if self.next != '(':
      return ''
    end = match_of(self.tokens, self.at)
    inside = self.tokens[self.at + 1:end]
    if self.tokens[end] != ')':
      raise Unreadable('an interval is no factor')
    if not all(t in (',', '-') or is_number(t) or (',' in inside and t.isalpha()) for t in inside) or not inside:
      return ''
    self.at = end + 1
    return f'({"".join(inside)})'


def substitute(node: Node, name: str, value: Node) -> Node:
  """Returns the expression with `value` in place of the variable `name`."""
  if node.op == 'symbol':
    return value if node.args[0] == name else node
  return Node(node.op, tuple(substitute(arg, name, value) if isinstance(arg, Node) else arg for arg in node.args))


def rename(node: Node, name: str, new: str) -> Node:
  """Returns the expression with the variable `name` renamed to `new`."""
  return substitute(node, name, Node('symbol', (new,)))
