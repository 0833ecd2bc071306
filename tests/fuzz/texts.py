"""The targets that read what models and runs have written: answers, benchmarks, and the files that a report reads."""

import contextlib
import gzip
import html.parser
import json
import os
import pathlib
import random
import re
import signal
import time

from hypothesis import strategies as st

from betarank.data.config import DataError
from tests.fuzz import mutate
from tests.fuzz.target import nothing, target

ANSWERS = (
  '42', '-0.50', '1,234,567', r'\frac{3}{4}', r'\boxed{\frac{1}{2}}', r'\sqrt{117}', 'x^2+2x+1', r'\{1, 2, 3\}',
  '(1, 2)', r'\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}', r'\text{Evelyn}', '50%', r'12\text{ cm}',
  r'(-\infty, 3] \cup [4, 5)', r'$\int_0^1 x^2 dx$', r'\sum_{i=1}^{n} i', '3 \\times 10^{8}', 'x = 3, y = 4',
  r'\pi r^2', '10!', r'\log_2 8', '1/3', r'\binom{10}{3}', r'\left\lfloor x \right\rfloor', '90^\\circ', 'a b c',
  "it's", '2 + 3i', '0.333...', r'0.\overline{3}')
WORDS = (
  '{', '}', '{' * 200, r'\frac{' * 100, r'\sqrt{' * 300, '(' * 500, ')' * 500, r'\boxed{', '$', '$$', r'\(', '^',
  '^{9}', '9^{9^{9^9}}', '9**9**9', '10!!!!', r'\left(' * 50, '9' * 5000, '1e999999', '-' * 1000, '+1' * 1000,
  'x' * 3000, '\\' * 300, r'\begin{matrix}' * 30, '&' * 200, r'\\' * 100, r'\int' * 50, r'\lim_{x \to 0}',
  r'\sum_{i=1}^{10^{10}} i', 'Answer: ', '\nAnswer: ', '\u0000', '\u2028', '\u0661', '½', '²', '∞', '\U0001d7d8',
  '\ufeff', 'e\u0301' * 100, 'ﬃ', 'lambda x: x', "__import__('os').system('true')", 'x.__class__', 'f"{1}"', 'True',
  'None', 'I', 'E', 'S', 'N', 'O', 'Q', 'oo', 'zoo', 'Integer(1)', 'factorial(10**9)', 'range(10**9)', 'Symbol("x")',
  ';', ':=', 'if', 'print', ',' * 500, '|' * 300, r'\text{' * 50, r'\mathrm{', r'\color{red}', r'\input{/etc/passwd}',
  r'\def\a{\a\a}\a', '%' * 100, r'10^{-10^{10}}')


def _answers():
  pieces = st.lists(st.sampled_from(WORDS + ANSWERS), max_size=6).map(''.join)
  return st.tuples(st.booleans(), st.text(max_size=60) | pieces, st.sampled_from(ANSWERS))


def _answer(rng: random.Random, good: bool):
  answer = rng.choice(ANSWERS)
  return rng.random() < 0.5, answer if good else mutate.text(rng, answer, WORDS), rng.choice(ANSWERS)


@target(160, strategy=_answers)
def answers(folder):
  """Builds the target that extracts an answer from a text, and judges it by all rules except math-verify.

  There must always be a verdict, and never an exception.
  """
  from betarank.tasks.answers import final_answer
  from betarank.tasks.judging.comparison import Judgement, judge
  from betarank.tasks.task_set import Task
  from betarank.tasks.verifiers import Verifier, VerifierConfig

  verifier = Verifier(VerifierConfig())  # starts no worker here

  def check(case):
    boxed, given, wanted = case
    task = Task('', 'Q', 'Question: Q\nSolution:', wanted, 'math', 'boxed' if boxed else 'line')
    for text in (f' steps\nAnswer: {given}\n', f'so \\boxed{{{given}}}.', given):
      found = final_answer(text, task)
      if found is not None and len(found) <= 10_000:  # as eval.sample.verifier.answer_chars
        assert isinstance(judge(wanted, found), Judgement)
      verifier._grade_here(found, task)  # in the trainer's own process

  return lambda rng, good=False: _answer(rng, good), check, nothing


@target(15, deadline_s=120.0)
def verifier(folder):
  """Builds the target of the whole verifier, with its worker processes. Every answer must get a verdict."""
  from betarank.tasks.task_set import Task, TaskConfig, TaskSet
  from betarank.tasks.verifiers import Verdict, Verifier, VerifierConfig

  pool = Verifier(VerifierConfig(workers=1, deadline_s=1.0))
  names = ('chain_sum', 'countdown', 'polynomial_equations')
  generated = [TaskSet(TaskConfig(f'reasoning:{name}'))[0] for name in names]

  def make(rng, good=False):
    boxed, given, wanted = _answer(rng, good)
    task = Task('', '', '', wanted, 'math', 'boxed' if boxed else 'line')
    task = rng.choice(generated) if rng.random() < 0.2 else task
    # (An answer with the text of the reference would be decided before any worker is asked.)
    return (f'\\boxed{{{given}}}' if task.answer_format == 'boxed' else f'\nAnswer: {given}'), task

  def check(case):
    [verdict] = pool.verify([case])
    assert isinstance(verdict, Verdict)
    assert not pool.counts['refused'], 'model text reached the system'

  return make, check, pool.close


@target(0, DataError, deadline_s=3.0)
def broken(folder):
  """Builds a target that fails in every way that the campaign must count. Only the campaign's own test uses it."""
  # Outside of `folder`, which a process that replaces a dead one empties, so that this process continues the count.
  counter = folder.parent / 'broken cases'

  def check(case):
    if case == 'good':
      return
    number = int(counter.read_text()) if counter.exists() else 0
    counter.write_text(str(number + 1))
    if number == 3:
      1 / 0  # noqa: B018
    if number == 4:
      bytearray(2**34)
    if number == 5:
      os.kill(os.getpid(), signal.SIGSEGV)
    if number == 6:
      time.sleep(100)
    if number > 7:
      raise DataError('as documented')

  return lambda rng, good=False: 'good' if good else 'bad', check, nothing


_RECORDS = (
  {'question': 'What is 1 + 1?', 'answer': 'It is two.\n#### 2'}, {'problem': 'x?', 'solution': 'so \\boxed{3}',
  'answer': '3'}, {'problem': 'y?', 'answer': 27.0}, {'question': 'z?', 'final_answer': ['4'], 'solution': ['w']})


@target(60, DataError)
def tasks(folder):
  """Builds the target of files with problems and answers, as RL and evaluation read them."""
  from betarank.tasks.task_set import TaskConfig, TaskSet

  def read(path):
    found = TaskSet(TaskConfig(f'jsonl:{path}', held_out_fraction=0.0), split='all')
    [found[i] for i in range(len(found))]

  return _records(folder, _RECORDS, read)


def _records(folder, records, read):
  """Returns (make, check, close), as in Target, for a reader of JSON Lines, compressed or not."""
  raw = b'\n'.join(json.dumps(record).encode() for record in records)

  def make(rng, good=False):
    content = raw
    if not good:
      content = mutate.json_text(rng, rng.choice(records)) if rng.random() < 0.6 else mutate.data(rng, raw, [raw])
    if rng.random() < 0.8:
      return 'x.jsonl', content
    packed = gzip.compress(content, mtime=0)
    return 'x.jsonl.gz', packed if good or rng.random() < 0.5 else mutate.data(rng, packed)

  def check(case):
    path = folder / case[0]
    path.write_bytes(case[1])
    read(path)

  return make, check, nothing


_PROGRAMS = (
  {'task_id': 'HumanEval/0', 'prompt': 'def f(x):\n', 'test': 'def check(f):\n  assert f(1)', 'entry_point': 'f'},
  {'task_id': 11, 'text': 'Write it.', 'code': 'def f(): pass', 'test_list': ['assert f()'], 'test_setup_code': ''},
  {'task_id': 12, 'prompt': 'Write it.', 'code': 'x', 'test_list': ['assert f()'], 'test_imports': ['import re'],
  'test': 'y'})


@target(40, DataError)
def programs(folder):
  """Builds the target of files with programming problems. No program is run."""
  from betarank.tasks.code_problems import read

  return _records(folder, _PROGRAMS, lambda path: read(str(path)))


@target(40)
def metrics(folder):
  """Builds the target of the metrics.jsonl of a resumed run. Lines that can't be read must be dropped."""
  from etils import epath

  from betarank.runtime.metrics import lines_of

  lines = tuple({'step': i, 'train/ce_nats': 2.5, 'time/step_s': 0.1} for i in range(1, 6))
  return _records(folder, lines, lambda path: list(lines_of(epath.Path(path))))


# Reports


class _Tags(html.parser.HTMLParser):
  """Parses a page. Fails at any tag or attribute that the report itself doesn't write, such as <script>."""

  BAD = re.compile(r'^(on|src$|srcdoc$|formaction$|action$)')

  def handle_starttag(self, tag, attrs):
    assert tag not in ('script', 'iframe', 'object', 'embed', 'form', 'img', 'base', 'foreignobject'), tag
    for name, value in attrs:
      assert not self.BAD.match(name) and not (value or '').lower().startswith('javascript:'), (tag, name, value)


def _sweep(folder: pathlib.Path):
  """Writes the workdirs of a sweep of two arms. Returns (root, {path: bytes} of all files)."""
  from tests.eval import sweep

  root = folder / 'sweep'
  sweep.make(root, arms=({}, {'beta': -0.25}), seeds=1, steps=4, rl_steps=2, problems=3, n=2)
  for path in (root / 'pre').iterdir():
    (path / 'samples.jsonl').write_text(json.dumps({'step': 4, 'prompt': 'Question: x', 'text': ' so 3'}) + '\n')
  return root, {path: path.read_bytes() for path in sorted(root.rglob('*')) if path.is_file()}


def _report(folder, read):
  root, raw = _sweep(folder)

  def make(rng, good=False):
    path = rng.choice(list(raw))
    content = raw[path]
    if good:
      return path, content
    if rng.random() < 0.6 and path.suffix in ('.json', '.jsonl'):
      lines = content.decode().splitlines() if path.suffix == '.jsonl' else [content.decode()]
      at = rng.randrange(len(lines))
      changed = [line.encode() for line in lines]
      changed[at] = mutate.json_text(rng, json.loads(lines[at]))
      return path, b'\n'.join(changed)
    return path, mutate.data(rng, content, [content])

  def check(case):
    path, content = case
    try:
      path.write_bytes(content)
      read(root)
    finally:
      path.write_bytes(raw[path])

  return make, check, nothing


@target(15)
def report(folder):
  """Builds the target of all computations of a report. No content of a file may raise an exception."""
  from etils import epath

  from betarank.eval.report.arms import read_sweep
  from betarank.eval.report.command import Report

  out = epath.Path(folder) / 'out'
  return _report(folder, lambda root: Report(read_sweep(root), out).runs())


@target(1, deadline_s=300.0)  # 18 s on an idle machine
def report_page(folder):
  """Builds the target of the whole page with its figures. The page must not contain markup from the files."""
  from betarank.eval.report.command import write_report

  return _report(folder, lambda root: _Tags().feed(write_report(str(root), str(folder / 'out')).read_text()))


@target(60)
def explore(folder):
  """Raw requests to the server of `betarank explore`: each is answered, and only the page's own with 200."""
  import socket
  import threading
  import urllib.parse

  from betarank.eval.explore import command, page
  from betarank.eval.explore.server import Server

  class Explorer:
    """Answers as the real one does, without a model."""

    def about(self):
      return {'models': ['a']}

    def text(self, text, samples=0, sampling=None):
      return {'text': text, 'samples': samples, 'sampling': repr(sampling)}

    document = problem = lambda self, *values: {'values': repr(values)}

  server = Server(page.served(), command.actions(Explorer()))
  threading.Thread(target=server.serve_forever, daemon=True).start()
  host, port = server.server_address
  root = urllib.parse.urlsplit(server.url).path
  sampling = {'temperature': 1.0, 'top_p': 1.0, 'max_new_tokens': 8, 'seed': 0}
  bodies = {'about': {}, 'text': {'text': 'one'}, 'continue': {'text': 'one', 'samples': 2, **sampling},
            'document': {'source': 'main', 'index': 3}, 'problem': {'index': 1, 'samples': 2, **sampling}}
  paths = ('', 'page.css', 'page.js', '../page.py', '..%2f..%2fetc/passwd', '/etc/passwd', 'api/', 'api/../page.js',
           '%00')

  def request(method, path, body=b'', **headers):
    head = {'Host': f'{host}:{port}', **({'Content-Type': 'application/json'} if body else {}),
            **({'Content-Length': len(body)} if body else {}), **headers}
    lines = [f'{method} {path} HTTP/1.1', *(f'{name}: {value}' for name, value in head.items())]
    return '\r\n'.join(lines).encode('utf-8', 'surrogatepass') + b'\r\n\r\n' + body

  def make(rng, good=False):
    action = rng.choice(list(bodies))
    body = json.dumps(bodies[action]).encode()
    if good:
      return True, request('POST', f'{root}api/{action}', body) if rng.random() < 0.7 else request('GET', root)
    how = rng.randrange(6)
    if how == 0:
      return False, request('POST', f'{root}api/{action}', mutate.json_text(rng, bodies[action])[:2**15])
    if how == 1:
      return False, request('GET', rng.choice((root, '/', '/x/', '//', root[:-2])) + rng.choice(paths))
    if how == 2:
      name, value = rng.choice((('Origin', 'null'), ('Origin', 'http://evil.example'), ('Sec-Fetch-Site', 'cross-site'),
                                ('Host', 'evil.example'), ('Host', f'localhost.evil.example:{port}'),
                                ('Content-Type', 'text/plain'), ('Content-Length', 10**12), ('Origin', ''),
                                ('Content-Length', -1), ('Host', f'[::1]:{port}'), ('Host', f'127.0.0.1:{port}@evil')))
      return None, request('POST', f'{root}api/{action}', body, **{name: value})
    words = [b'\r\n', b'\r\n\r\n', b'HTTP/0.9']
    return False, mutate.data(rng, request('POST', f'{root}api/{action}', body), tokens=words)

  def check(case):
    good, sent = case
    with socket.create_connection((host, port), timeout=20) as connection:
      with contextlib.suppress(OSError):  # it has closed already
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
      answer = b''
      with contextlib.suppress(ConnectionError):
        while part := connection.recv(2**16):
          answer += part
    status = int((re.match(rb'HTTP/1\.[01] (\d{3}) ', answer) or [0, b'0'])[1])
    assert status == 200 or good is not True, answer[:200]
    assert status != 200 or good is not None, 'a foreign request was answered'
    assert status < 500 or status in (501, 505), answer[:300]
    assert b'root:' not in answer and b'Traceback' not in answer

  return make, check, server.shutdown
