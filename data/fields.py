"""Makes documents from the fields of records. A field specification has one of these forms:

    text                 one field that holds text; OUTER.INNER is the field INNER inside the field OUTER
    question+answer      two fields, a prompt and its answer; the loss counts only the answer
    messages             one field that holds a list of {"role": ..., "content": ...}; the loss counts only what the
                         assistant says

The third form needs a template that contains {role} and {content}. Without a template, a single field must hold text.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from betarank.data.config import DataError

PAIR = 'Question: {prompt}\nSolution: {answer}\n'  # the default template of a prompt and an answer
_TRAINED_ROLES = ('assistant', 'gpt', 'model')


class Dialogue(NamedTuple):
  """A document in which only some parts count in the loss. Each part is (text, whether the part counts)."""

  parts: tuple[tuple[str, bool], ...]

  @property
  def text(self) -> str:
    return ''.join(text for text, _ in self.parts)


class BadValue(Exception):
  """Raised for a record from which no document can be made. The message says why."""


def masked(spec: str, template: str) -> bool:
  """Returns whether documents of this field specification and template have tokens that are masked from the loss.

  True means that they are Dialogues, False that they are plain text.
  """
  return '+' in spec or bool(template)


def check_template(spec: str, template: str) -> None:
  """Raises ValueError if the template lacks a placeholder that the field specification needs.

  For two fields (FIELD+FIELD), a template must contain {prompt} and then {answer}. For one field, it must contain
  {role} and then {content}. Each placeholder must occur exactly once. An empty template is always valid.
  """
  if not template:
    return
  needed = ('{prompt}', '{answer}') if '+' in spec else ('{role}', '{content}')
  for place in needed:
    if template.count(place) != 1:
      what = 'a prompt and an answer (FIELD+FIELD)' if '+' in spec else 'messages'
      raise ValueError(f'template of {what} must hold {" and ".join(needed)} once each, got {template!r}')
  if template.index(needed[0]) > template.index(needed[1]):
    raise ValueError(f'template must have {needed[0]} before {needed[1]}, got {template!r}')


class Fields:
  """Makes documents from records, according to a field specification and a template.

  Attributes:
    names: the names of the fields that every record must have.
  """

  def __init__(self, spec: str, template: str):
    self.names = tuple(spec.split('+'))
    self._template = template or (PAIR if len(self.names) == 2 else '')

  def document(self, record: Mapping[str, Any]) -> str | Dialogue:
    """Returns the document made from a record.

    Raises:
      BadValue: a field is missing or its value has the wrong type, or no part of the document counts in the loss.
    """
    values = [_value(record, name) for name in self.names]
    if not self._template:
      return text_of(values[0], self.names[0])
    if len(values) == 2:
      prompt, answer = (text_of(value, name) for value, name in zip(values, self.names))
      before, after = self._template.split('{answer}')
      return _dialogue([(before.replace('{prompt}', prompt), False), (answer + after, True)])
    return _dialogue(self._messages(values[0]))

  def _messages(self, messages: Any) -> list[tuple[str, bool]]:
    name = self.names[0]
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
      raise BadValue(f'field {name!r} must be a list of messages, got {type(messages).__name__}')
    before, after = self._template.split('{content}')
    parts = []
    for message in messages:
      if not isinstance(message, Mapping):
        raise BadValue(f'field {name!r} must hold objects with role and content, got {type(message).__name__}')
      role, content = (text_of(message.get(key, message.get(other)), f'{name}.{key}')
                       for key, other in (('role', 'from'), ('content', 'value')))
      trained = role in _TRAINED_ROLES
      parts += [(before.replace('{role}', role), False), (content + after.replace('{role}', role), trained)]
    return parts


def _dialogue(parts: list[tuple[str, bool]]) -> Dialogue:
  """Returns a Dialogue made from `parts`. Each part is (text, whether the part counts in the loss).

  Adjacent parts are joined if both count or if neither counts. Spaces directly before a part that counts are moved into
  this part, because tokenizers join a space to the word after it.

  Raises:
    BadValue: no part counts in the loss.
  """
  joined: list[tuple[str, bool]] = []
  for text, trained in parts:
    if trained and joined and not joined[-1][1]:
      before = joined.pop()[0]
      kept = before.rstrip(' ')
      joined += [(kept, False)] * bool(kept)
      text = before[len(kept):] + text
    if joined and joined[-1][1] == trained:
      text = joined.pop()[0] + text
    joined += [(text, trained)] * bool(text)
  if not any(trained for _, trained in joined):
    raise BadValue('there is no answer for the loss to count')
  return Dialogue(tuple(joined))


def _value(record: Mapping[str, Any], name: str) -> Any:
  if name in record:
    return record[name]
  value: Any = record
  for part in name.split('.'):
    if not isinstance(value, Mapping) or part not in value:
      present = ', '.join(sorted(map(str, record))) or 'none'
      raise BadValue(f'no field {name!r}, only {present}')
    value = value[part]
  return value


def text_of(value: Any, name: str) -> str:
  """Returns the value of field `name` as text. Raises BadValue if the value is neither text nor UTF-8 bytes."""
  if isinstance(value, bytes):
    try:
      return value.decode()
    except UnicodeDecodeError as error:
      raise BadValue(f'field {name!r} is not UTF-8 at byte {error.start}') from None
  if not isinstance(value, str):
    hint = '; a list of messages needs a template (sources.NAME.template)' if isinstance(value, list) else ''
    raise BadValue(f'field {name!r} must be text, got {type(value).__name__}{hint}')
  # JSON can contain half of a surrogate pair, which UTF-8 can't encode. It becomes U+FFFD.
  return value if value.isascii() else value.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def missing_field(where: str, name: str, present: Sequence[str], uri: str) -> DataError:
  names = ', '.join(sorted(present))
  return DataError(f'{where}: no field {name!r}, only {names}; name the right one: {uri}#FIELD')
