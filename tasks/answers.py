r"""Cuts the final answer out of a text that a model wrote.

`final_answer` is the one way to do this: reinforcement learning, evaluation and `betarank judge` all go through it.
"""

import re
from typing import Protocol

from betarank.data.reasoning import ANSWER_MARK

ANSWER_FORMATS = ('line', 'boxed')
CODE_END = '\n[DONE]'  # of a program, in the prompts of MBPP
_BOX = re.compile(r'\\(?:boxed|framebox|fbox)\s*')
_MAX_BOXES = 64  # the last ones of a text
# What may stand between two boxes of one answer: \boxed{1} and \boxed{2}, x_1 = \boxed{1}, x_2 = \boxed{2}.
_JOINED = re.compile(r'(?:[\s$,;&]|\\[,;:!()\[\]\\ ]|\\q?quad|\\?\b(?:text|mathrm)\s*\{\s*|\}|and|or|'
                     r'(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?\s*=)*')
# A line at the margin ends the function that the prompt began; a closing bracket or the end of a long string doesn't.
_LEFT_FUNCTION = re.compile(r'\n(?=[^\s)\]}\'"])')


class Question(Protocol):
  """What is known of a question when an answer is cut out; tasks/records.py has the whole task."""

  question: str
  prompt: str
  answer_format: str  # line | boxed | code
  answer_lines: int  # of an answer in 'line' format; 0: all there are
  entry: str  # code: the beginning of the function, '' for a whole program


def final_answer(text: str, task: Question) -> str | None:
  r"""Returns the final answer in `text`, stripped; None if there is none.

  line: the `answer_lines` lines (0: all) after the first '\nAnswer: '. The first, because a model that doesn't stop
  continues with questions of its own. boxed: the content of the last \boxed{...} with balanced braces that answers this
  question; boxes with nothing but 'and', 'or' or commas between them are one answer, joined by commas. code: the part
  that is run, up to the end of the function or to [DONE].
  """
  if task.answer_format == 'line':
    _, mark, rest = text.partition(ANSWER_MARK)
    answer = '\n'.join(rest.split('\n')[:task.answer_lines or None]).strip()
    return answer if mark and answer else None
  if task.answer_format == 'code':
    return _program(text, task.entry)
  return last_boxed(_up_to_next_question(text, task))


def last_boxed(text: str) -> str | None:
  r"""Returns the content of the last \boxed{...}, or of the last run of boxes that make up one answer."""
  found: list[tuple[int, int, str]] = []  # (start, end, content), from the last one back
  limit = len(text)
  for match in reversed(list(_BOX.finditer(text))[-_MAX_BOXES:]):
    inside = _balanced(text, match.end(), limit)
    if inside is None:
      continue
    content, end = inside
    if found and not _JOINED.fullmatch(text[end:found[-1][0]]):
      break
    found.append((match.start(), end, content.strip()))
    limit = match.start()
  contents = [content for _, _, content in reversed(found) if content]
  return ', '.join(dict.fromkeys(contents)) or None


def _balanced(text: str, start: int, limit: int) -> tuple[str, int] | None:
  """(content, end) of the group at `start`, or of the one character there; None if it isn't closed before `limit`."""
  if text[start:start + 1] != '{':
    return (text[start], start + 1) if start < limit else None  # \boxed 5
  depth = 0
  for i in range(start, limit):
    if text[i] in '{}' and text[i - 1] != '\\':
      depth += 1 if text[i] == '{' else -1
      if not depth:
        return text[start + 1:i], i + 1
  return None


def _up_to_next_question(text: str, task: Question) -> str:
  """Cuts `text` where a model that didn't stop makes up a question of its own in the form of the prompt."""
  if not task.question:
    return text
  opening = task.prompt[: max(task.prompt.rfind(task.question), 0)].rsplit('\n', 1)[-1].strip()
  return text.partition(f'\n{opening}')[0] if opening else text


def _program(text: str, entry: str) -> str:
  if not entry:
    return text.partition(CODE_END)[0]
  found = _LEFT_FUNCTION.search(text)
  return text[: found.start() + 1] if found else text
