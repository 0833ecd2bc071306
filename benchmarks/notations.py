r"""Writes a reference answer in other notations, each of which a judge must accept.

    notations('4.5e33')      ['4.5 \\times 10^{33}', '4.5 \\cdot 10^{33}', '45e32', '$4.5e33$']

This module doesn't use the judge's parser, so that it can reveal errors of the parser.
"""

import re
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r'[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?')
_NAMED = re.compile(r"\s*([A-Za-z](?:_\{?\\?\w+\s*\}?)?(?:\([a-z]\))?)\s*=([^=]*)")


def notations(gold: str) -> list[str]:
  """Returns at least two other ways to write the reference answer `gold`. `gold` itself isn't among them."""
  text = re.sub(r'(?<!\\)\$', '', gold).strip().rstrip('.').strip()
  if re.fullmatch(r'\\?\$?\d{1,3}(,\s*(\\!)?\s*\d{3})+(\.\d+)?', text):
    bare = re.sub(r'[^\d.]', '', text)
    return [bare, f'{Decimal(bare):,f}'.replace(',', '{,}'), f'${text}$']
  found = [*_of_number(text), *_of_list(text), *_of_equation(text), *_of_interval(text), *_of_tuple(text),
           *_of_expression(text), *_layouts(text)]
  return [other for other in dict.fromkeys(found) if other not in (gold, text)]


def _of_number(text: str) -> list[str]:
  if percent := re.fullmatch(r'([\d.]+)\s*\\?%', text):
    return [f'{percent[1]}\\%', f'{percent[1]} \\text{{ percent}}', str(Decimal(percent[1]) / 100)]
  if degrees := re.fullmatch(r'([\d.]+)\s*\^\{?\\circ\s*\}?', text):
    return [f'{degrees[1]} \\text{{ degrees}}', f'{degrees[1]}^\\circ', degrees[1]]
  if not _NUMBER.fullmatch(text):
    return []
  try:
    value = Decimal(text)
  except InvalidOperation:
    return []
  sign, digits, exponent = value.as_tuple()
  mantissa = ('-' if sign else '') + ''.join(map(str, digits))
  places = len(digits) - 1 + exponent
  scientific = f'{mantissa[:1 + sign]}.{mantissa[1 + sign:] or "0"}'
  others = [f'{scientific} \\times 10^{{{places}}}', f'{scientific} \\cdot 10^{{{places}}}', f'{scientific}e{places}',
            f'{mantissa} \\times 10^{{{exponent}}}']
  if abs(places) < 12:
    others += [f'{value:,f}', f'{value:f}', f'{value:f}' + ('0' if exponent < 0 else '.0')]
  if -12 < exponent < 0:
    others.append(f'\\frac{{{mantissa}}}{{{10 ** -exponent}}}')
  return others


def _split(text: str, separator: str = ',') -> list[str]:
  """Returns the parts of a text between separators. Separators in brackets don't count."""
  parts, depth, start = [], 0, 0
  for i, character in enumerate(text):
    depth += (character in '([{') - (character in ')]}')
    if character == separator and not depth:
      parts.append(text[start:i].strip())
      start = i + 1
  return [*parts, text[start:].strip()]


def _of_list(text: str) -> list[str]:
  parts = _split(text)
  if len(parts) == 1 or not all(parts):
    return []
  others = [', '.join(reversed(parts)), ', '.join(parts[:-1]) + f' \\text{{ and }} {parts[-1]}', ' ; '.join(parts)]
  return others if '=' in text or '\\cup' in text else [*others, '\\{' + ', '.join(parts) + '\\}']


def _of_equation(text: str) -> list[str]:
  if text.count('=') != 1 or ',' in text:
    return []
  left, right = (side.strip() for side in text.split('='))
  others = [f'{right} = {left}', f'{left} - ({right}) = 0'] if '\\angle' not in left else []
  named = _NAMED.fullmatch(text)
  return [*([right] if named else []), *([] if named and '(' in named[1] else others)]


def _of_interval(text: str) -> list[str]:
  if bound := re.fullmatch(r'([a-z])\s*\\ge\w*\s*(\S+)', text):
    return [f'{bound[2]} \\le {bound[1]}', f'[{bound[2]}, \\infty)']
  if '\\cup' in text:
    parts = [part.strip() for part in text.split('\\cup')]
    return [' \\cup '.join(reversed(parts)), 'x \\in ' + text]
  ends = re.fullmatch(r'(\(|\[)([^,()\[\]]+),([^,()\[\]]+)(\)|\])', text)
  if ends is None or (ends[1] + ends[4] == '()' and 'infty' not in text):
    return []
  low, high = ends[2].strip(), ends[3].strip()
  above, below = ('\\le' if ends[1] == '[' else '<'), ('\\le' if ends[4] == ']' else '<')
  if 'infty' in low or 'infty' in high:
    return [f'x {below} {high}' if 'infty' in low else f'{low} {above} x']
  return [f'{low} {above} x {below} {high}', f'x \\in {text}']


def _of_tuple(text: str) -> list[str]:
  if not re.fullmatch(r'\([^()]*,[^()]*\)', text):
    return []
  parts = _split(text[1:-1])
  return ['\\left(' + ' , '.join(parts) + '\\right)', '\\langle ' + ', '.join(parts) + '\\rangle']


def _of_expression(text: str) -> list[str]:
  whole = re.search(r'[=<>,;%$]|\\(?:ge|le|in|cup|pm|text|mbox|circ|begin|geq\w*)\b|^\d+_', text)
  if whole or _NUMBER.fullmatch(text):
    return []
  inside = f'\\left({text}\\right)'
  return [f'\\frac{{2{inside}}}{{2}}', f'-\\left(-{inside}\\right)', f'0 + {inside}']


def _layouts(text: str) -> list[str]:
  return [f'${text}$', f'\\boxed{{{text}}}', text.replace('\\frac', '\\dfrac').replace(',', ', '),
          text.replace('pmatrix', 'bmatrix')]
