"""Extracts the final answer from a text that a model wrote.

RL, evaluation and `betarank judge` all use `final_answer`.
"""

import re
from typing import Protocol

from betarank.data.reasoning import ANSWER_MARK

ANSWER_FORMATS = ('line', 'boxed')
CODE_END = '\n[DONE]'  # ends a program in the prompts of MBPP
_BOX = re.compile(r'\\(?:boxed|framebox|fbox)\s*')
_MAX_BOXES = 64  # only the last 64 boxes of a text are considered
# What can be between two boxes of one answer, as in \boxed{1} and \boxed{2}, or x_1 = \boxed{1}, x_2 = \boxed{2}.
_JOINED = re.compile(r'(?:[\s$,;&]|\\[,;:!()\[\]\\ ]|\\q?quad|\\?\b(?:text|mathrm)\s*\{\s*|\}|and|or|'
                     r'(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?\s*=)*')
# A line without indentation ends the function that the prompt began, unless it is a closing bracket or a quote.
_LEFT_FUNCTION = re.compile(r'\n(?=[^\s)\]}\'"])')


class Question(Protocol):
  """The fields of a task that are needed to extract an answer. Task in tasks/records.py has these and others."""

  question: str
  prompt: str
  answer_format: str  # line | boxed | code
  answer_lines: int  # the number of lines of an answer in 'line' format; 0: all lines
  entry: str  # code: the beginning of the function, '' for a whole program


def final_answer(text: str, task: Question) -> str | None:
  r"""Returns the final answer in `text`, or None if there is none. task.answer_format says where the answer is:

  line: in the first `task.answer_lines` lines after the first '\nAnswer: '; 0 means all lines.
  boxed: in the last \boxed{...} with balanced braces. If the last boxes are separated only by 'and', 'or' or commas,
    their contents are one answer, joined by commas.
  code: from the beginning of the text to the end of the function or to [DONE].

  Except in the format 'code', a new question that the model asks itself is ignored with all text after it, because a
  model that doesn't stop continues with questions and answers of its own. (Such a question is recognized if the prompt
  has a letter before the question, in the same line.) White space around the answer is removed.
  """
  if task.answer_format == 'code':
    return _program(text, task.entry)
  text = _up_to_next_question(text, task)
  if task.answer_format == 'line':
    _, mark, rest = text.partition(ANSWER_MARK)
    answer = '\n'.join(rest.split('\n')[:task.answer_lines or None]).strip()
    return answer if mark and answer else None
  return last_boxed(text)


def last_boxed(text: str) -> str | None:
  r"""Returns the content of the last \boxed{...} in `text`; None if there is no box.

  If the last boxes are separated only by 'and', 'or' or commas, returns all their contents, joined by commas.
  """
  found: list[tuple[int, int, str]] = []  # (start, end, content), the last box first
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
  """Returns (content, end) of the brace group at `start`. `end` is the position after the group.

  If there is no brace at `start`, the content is the one character at `start`. Returns None if the group isn't closed
  before the position `limit`, or if `start` isn't before `limit`.
  """
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
  """Returns the part of `text` before the first line that begins like the prompt's question, such as 'Question:'.

  Returns the whole text if that beginning has no letter, such as '1)' or '*', with which steps of a solution begin too.
  """
  if not task.question:
    return text
  opening = task.prompt[: max(task.prompt.rfind(task.question), 0)].rsplit('\n', 1)[-1].strip()
  return text.partition(f'\n{opening}')[0] if any(map(str.isalpha, opening)) else text


def _program(text: str, entry: str) -> str:
  if not entry:
    return text.partition(CODE_END)[0]
  found = _LEFT_FUNCTION.search(text)
  return text[: found.start() + 1] if found else text
