"""The target of templates: those of sources and prompts, and the chat templates of other people's tokenizers.

A template is data: each of its names in braces is replaced once, and nothing is evaluated. The chat template of a
tokenizer isn't read at all.
"""

import contextlib
import json
import random

from betarank.data.config import DataError
from betarank.data.fields import BadValue, Fields, check_template
from betarank.tasks.task_set import TaskConfig, TaskSet
from tests.fuzz import mutate
from tests.fuzz.target import nothing, target

# A '#' becomes the path of a file that appears if a template is evaluated.
HOSTILE = (
  "{{ cycler.__init__.__globals__.os.system('touch #') }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
  "{% for i in range(10**12) %}x{% endfor %}", "{% set x = 'a' * 10**10 %}{{ x }}", "{% include '/etc/passwd' %}",
  "{{ lipsum.__globals__['os'].popen('touch #').read() }}", '{% raw %}', '{{', '%}', '{role.__class__}',
  '{0.__class__.__init__.__globals__}', '{content!r:>9999999999}', '{content}', '{role}', '{prompt}', '{answer}',
  '{question}', '%(role)s', '%s' * 50, '${content}', '$(touch #)', '`touch #`', r'\g<0>', r'\1', '<|im_start|>',
  'assistant', 'gpt', '\0', '\n')
MESSAGES = '<|im_start|>{role}\n{content}<|im_end|>\n'
PAIR = 'Question: {prompt}\nSolution: {answer}\n'
QUESTION = 'Question: {question}\nSolution:'


def _filled(template: str, values: dict[str, str]) -> str:
  """Returns `template` with each {NAME}, of which there is one, replaced by values[NAME]."""
  places = sorted((template.index(f'{{{name}}}'), name) for name in values)
  text, at = '', 0
  for place, name in places:
    text += template[at:place] + values[name]
    at = place + len(name) + 2
  return text + template[at:]


@contextlib.contextmanager
def _checks():
  """Converts ValueError, by which settings refuse their values, to DataError."""
  try:
    yield
  except ValueError as error:
    raise DataError(str(error)) from None


@target(60, DataError)
def templates(folder):
  """Builds the target of templates. What isn't refused must be filled in literally, and no command in it may run."""
  from betarank.data.tokenizer import read_tokenizer
  from tests import tokenizer_files

  canary = folder / 'canary'
  hostile = tuple(text.replace('#', str(canary)) for text in HOSTILE)
  place = folder / 'tokenizer'
  tokenizer_files.byte_level(place, 'qwen')
  config = json.loads((place / 'tokenizer_config.json').read_text())
  want = read_tokenizer(str(place)).encode('one two three').tolist()
  problems = folder / 'x.jsonl'

  def make(rng: random.Random, good=False):
    spoilt = lambda text: text if good or rng.random() < 0.3 else mutate.text(rng, text, hostile)
    words = lambda: spoilt(rng.choice((*hostile, 'one two')))
    kind = rng.choice(('messages', 'prompt+answer', 'question', 'tokenizer'))
    if kind == 'messages':
      roles = ('user', 'assistant') if good else ('user', 'assistant', 'gpt', words())
      return kind, spoilt(MESSAGES), [(rng.choice(roles), words()) for _ in range(rng.randint(1, 4))]
    if kind == 'prompt+answer':
      return kind, spoilt(PAIR), (words(), 'one' if good else words())
    if kind == 'question':
      return kind, spoilt(QUESTION), 'one' if good else words()
    value = words() if good or rng.random() < 0.7 else mutate.value(rng)
    return kind, rng.choice((value, [{'name': 'default', 'template': value}], {'default': value})), words()

  def check(case):
    kind, template, values = case
    if kind == 'tokenizer':
      (place / 'tokenizer_config.json').write_bytes(json.dumps({**config, 'chat_template': template}).encode())
      (place / 'chat_template.jinja').write_bytes(values.encode('utf-8', 'surrogatepass'))
      assert read_tokenizer(str(place)).encode('one two three').tolist() == want
    elif kind == 'question':
      problems.write_text(json.dumps({'question': values, 'answer': '1'}))
      with _checks():
        task_config = TaskConfig(f'jsonl:{problems}', prompt=template, held_out_fraction=0.0)
      tasks = TaskSet(task_config, split='all')
      assert tasks[0].prompt == _filled(template, {'question': tasks[0].question})
    else:
      with _checks():
        check_template(kind, template)
      if not template:
        return
      clean = lambda text: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
      if kind == 'messages':
        record = {'messages': [{'role': role, 'content': content} for role, content in values]}
        filled = [_filled(template, {'role': clean(role), 'content': clean(content)}) for role, content in values]
      else:
        record = dict(zip(('prompt', 'answer'), values))
        filled = [_filled(template, {name: clean(text) for name, text in record.items()})]
      try:
        document = Fields(kind, template).document(record)
      except BadValue:  # no message is an assistant's, or what it says is empty
        return
      assert document.text == ''.join(filled)
    assert not canary.exists()

  return make, check, nothing
