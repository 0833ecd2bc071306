"""A process that grades by math-verify or reasoning-gym's scorers, code that isn't ours. See verifiers.py.

    python rl/verifier_worker.py math|reasoning_gym MEMORY_MB CPU_S       JSON lines in, JSON lines out

Model text comes here as data and may not become code. reasoning-gym has scorers that call `eval` on it, or
sympy's `parse_expr`, which does: both are replaced before any text arrives. Should a way be left, the process
can't write files or start programs, and an audit hook ends it at the first event that touches the system. It
keeps the run safe from what models write by accident or in pursuit of reward. It is no jail for native code;
programs as answers have their own.

Imports nothing of the project, so that it starts in about a second.
"""

import ast
import json
import os
import re
import resource
import sys

REFUSED = 86  # exit status
UNDECIDED, WRONG, RIGHT = -1, 0, 1

_ALLOWED = {'os.listdir', 'os.scandir', 'os.walk'}  # what an import of one more module of a library needs
_REFUSED_PREFIXES = (
  'os.', 'shutil.', 'subprocess.', 'socket.', 'ctypes.', 'pty.', 'tempfile.', 'fcntl.', 'mmap.', 'sqlite3.',
  'urllib.', 'http.', 'ftplib.', 'smtplib.', 'poplib.', 'imaplib.', 'telnetlib.', 'webbrowser.', 'gc.get',
  'code.__new__', 'function.__new__', 'cpython.', 'sys.set', 'pickle.', 'builtins.input', 'signal.',
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NAMES = {
  'sqrt', 'exp', 'log', 'ln', 'Abs', 'sin', 'cos', 'tan', 'cot', 'sec', 'csc', 'asin', 'acos', 'atan', 'sinh',
  'cosh', 'tanh', 'pi',
}


def _audit(event: str, args: tuple) -> None:
  if event == 'open':
    if isinstance(args[2], int) and args[2] & _WRITES:
      os._exit(REFUSED)
  elif event.startswith(_REFUSED_PREFIXES) and event not in _ALLOWED:
    os._exit(REFUSED)


def _limit(memory_mb: int) -> None:
  megabytes = memory_mb * 2**20
  for kind, value in ((resource.RLIMIT_AS, megabytes), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0),
                      (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_NOFILE, 64)):
    resource.setrlimit(kind, (value, value))


def _limit_cpu(seconds: int) -> None:
  """The next item's: should our parent be gone, nobody else would end an endless one."""
  used = resource.getrusage(resource.RUSAGE_SELF)
  hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
  resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, hard))


def _guard(package: str) -> None:
  """Replaces what evaluates text, as the modules of an imported package see it; sympy's own use stays."""
  import sympy
  from sympy.parsing.sympy_parser import parse_expr

  def guarded(text, *args, **kwargs):
    """Arithmetic only: no attributes, subscripts, strings, or names that aren't variables or functions."""
    names = re.findall(r'[^\W\d]\w*', text)
    if not re.fullmatch(r'[\w\s+\-*/^().,!=<>|]*', text, re.ASCII) or re.search(r'\.\s*[^\W\d]|__', text):
      raise ValueError('not an expression')
    if any(len(name) > 1 and name not in _NAMES for name in names):
      raise ValueError('not an expression')
    return parse_expr(text, *args, **kwargs)

  sympy.parse_expr = guarded
  for name, module in list(sys.modules.items()):
    if name.startswith(package):
      if getattr(module, 'parse_expr', None) is parse_expr:
        module.parse_expr = guarded
      if not name.endswith('.bitwise_arithmetic'):  # evaluates its own problem, not the answer
        module.eval = ast.literal_eval


def math_grader():
  """(answer, reference, entry) -> (verdict, why) by math-verify."""
  import logging

  logging.disable(logging.CRITICAL)
  import math_verify
  from sympy import Basic, MatrixBase

  _guard('math_verify')

  def parse(text):
    text = text.replace('**', '^')  # LaTeX reads 9**9 as 9
    wrapped = text if '$' in text.replace(r'\$', '') or r'\(' in text or r'\[' in text else f'${text}$'
    # Its own time limit is an alarm signal; ours is the parent's, which nothing in here can catch.
    found = math_verify.parse(wrapped, parsing_timeout=None)
    if not any(isinstance(x, Basic | MatrixBase) for x in found) and '\\' not in text:
      found = math_verify.parse(text, parsing_timeout=None) or found
    return found

  def grade(answer, reference, _):
    gold = parse(reference)
    if math_verify.verify(gold, parse(answer), timeout_seconds=None):
      return RIGHT, None
    return (WRONG, None) if any(isinstance(x, Basic | MatrixBase) for x in gold) else (UNDECIDED, 'unparsed')

  grade(r'\frac{1}{2}x^2', r'0.5x^2', '')  # builds grammar and regular expressions, imports what it needs
  return grade


def reasoning_gym_grader():
  """(answer, reference, entry) -> (verdict, why) by the scorer of the task's own generator."""
  from reasoning_gym.factory import DATASETS

  _guard('reasoning_gym.')
  scorers = {}

  def grade(answer, _, entry):
    name, options, record = ast.literal_eval(entry)
    key = name, repr(options)
    if key not in scorers:
      dataset, config = DATASETS[name]
      scorers[key] = dataset(config=config(**{'seed': 0, 'size': 1, **options})).score_answer
    return (RIGHT if scorers[key](answer, record) >= 1 else WRONG), None

  return grade


def main() -> None:
  kind, memory_mb, cpu_s = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
  # The pipes move away from 0 and 1, where a library's print would end up among our answers.
  requests, answers = os.fdopen(os.dup(0), 'rb'), os.fdopen(os.dup(1), 'wb')
  null = os.open(os.devnull, os.O_RDWR)
  for fd in (0, 1, 2):
    os.dup2(null, fd)

  def say(**message):
    answers.write(json.dumps(message).encode() + b'\n')
    answers.flush()

  try:
    grade = {'math': math_grader, 'reasoning_gym': reasoning_gym_grader}[kind]()
  except ImportError as error:
    say(error=f'{error}; pip install {kind.replace("math", "math-verify").replace("_", "-")}')
    return
  _limit(memory_mb)
  sys.addaudithook(_audit)
  say(ready=True)
  for line in requests:
    request = json.loads(line)
    _limit_cpu(cpu_s)
    try:
      verdict, why = grade(request['answer'], request['reference'], request['entry'])
    except (MemoryError, RecursionError):
      verdict, why = UNDECIDED, 'crashes'
    except Exception:  # a library that stumbles over an answer: it couldn't be read as one
      verdict, why = WRONG, 'stumbles'
    say(token=request['token'], verdict=verdict, **({'why': why} if why else {}))


if __name__ == '__main__':
  main()
