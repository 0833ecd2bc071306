"""Grades answers in a process of its own: by betarank's rules and math-verify, by reasoning-gym's scorers, or by a
user's reward function.

    python tasks/verifier_worker.py KIND MEMORY_MB CPU_S       JSON lines in, JSON lines out

KIND is math, reasoning_gym, or 'reward FILE.py:FUNCTION'. worker_pool.py starts this process and talks to it.

Text written by a model arrives here as data, and must not become code. Some scorers of reasoning-gym pass such text to
`eval`, or to sympy's `parse_expr`, which calls `eval`. Both functions are replaced before any text arrives. In case
text becomes code in another way, the process can't write files or start programs, and an audit hook ends the process at
the first event that touches the system.

This protects a run from what models write by accident or to get reward. It isn't a jail for native code. Answers that
are programs run in a jail instead (code_jail.py).
"""

import ast
import json
import math
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
  """Ends this process if the next item takes more than about `seconds` CPU seconds.

  Usually the parent process enforces the deadline. This limit still holds if the parent process has died.
  """
  used = resource.getrusage(resource.RUSAGE_SELF)
  hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
  resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, hard))


def _guard(package: str) -> None:
  """Replaces `eval` and `parse_expr` with harmless functions in all imported modules of a package.

  sympy's own modules keep using the original functions. reasoning-gym's module bitwise_arithmetic keeps `eval`, because
  it evaluates only its own problem, not the answer.
  """
  import sympy
  from sympy.parsing.sympy_parser import parse_expr

  def guarded(text, *args, **kwargs):
    """Returns the result of `parse_expr(text, *args, **kwargs)` if `text` is harmless arithmetic.

    It is harmless if it has only numbers, variables of one letter, operators and known functions.

    Raises:
      ValueError: `text` has attributes, subscripts, strings or unknown names.
    """
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
      if not name.endswith('.bitwise_arithmetic'):  # this module evaluates its own problem, not the answer
        module.eval = ast.literal_eval


def math_grader():
  """Returns a function that grades mathematical answers by the rules of comparison.py and, where needed, by
  math-verify.

  The function takes a request {'reference': text, 'answer': text} and returns a reply {'verdict', 'rule', 'gold',
  'given'}. 'rule' is a phrase that says what decided. 'gold' and 'given' say how the reference and the answer were
  understood. If the reference can't be read, the reply also has 'why': 'unread'.

  If the answer is None, the function only checks whether the reference can be read. The reply is then {'rule': reason},
  where the reason is '' if the reference can be read.
  """
  import logging

  logging.disable(logging.CRITICAL)
  import math_verify
  from sympy import Basic, MatrixBase

  from betarank.tasks.judging import comparison

  _guard('math_verify')
  latex = [math_verify.LatexExtractionConfig()]  # its other method isn't used, because sympy's parser evaluates text

  def parse(text):
    # math-verify's own time limit is an alarm signal. Ours is enforced by the parent, and nothing here can catch it.
    return [x for x in math_verify.parse(f'${text}$', latex, parsing_timeout=None) if isinstance(x, Basic | MatrixBase)]

  def by_math_verify(gold, answer):
    wanted = parse(gold)
    return math_verify.verify(wanted, parse(answer), timeout_seconds=None) if wanted else None

  def grade(request):
    if request['answer'] is None:
      return {'rule': comparison.why_unreadable(request['reference'], by_math_verify)}
    judged = comparison.judge(request['reference'], request['answer'], by_math_verify)
    reply = {'verdict': int(judged.verdict), 'rule': judged.rule, 'gold': judged.gold, 'given': judged.answer}
    return reply if judged.gold_is_read else {**reply, 'why': 'unread'}

  # The first use builds the grammar and regular expressions, and imports more modules.
  grade({'reference': r'\int_0^1 x^2 dx', 'answer': r'\sum_{k=1}^3 \sin(k)'})
  return grade


def reasoning_gym_grader():
  """Returns a function that grades answers with the scorer of the reasoning-gym task that made the problem.

  The function takes a request {'answer': text, 'entry': the task's entry} and returns a reply {'verdict', 'rule'}.
  'rule' is a phrase with the score.
  """
  from betarank.configs import light_imports

  light_imports.reasoning_gym()
  from reasoning_gym.factory import DATASETS

  _guard('reasoning_gym.')
  scorers = {}

  def grade(request):
    name, options, record = ast.literal_eval(request['entry'])
    key = name, repr(options)
    if key not in scorers:
      dataset, config = DATASETS[name]
      scorers[key] = dataset(config=config(**{'seed': 0, 'size': 1, **options})).score_answer
    score = scorers[key](request['answer'], record)
    return {'verdict': RIGHT if score >= 1 else WRONG, 'rule': f'its scorer gives {score:g}'}

  return grade


def reward_grader(name):
  """Returns a function that grades samples with a user's reward function.

  The function takes a request with the keys text, answer ('' if there is no final answer), reference and question, and
  returns a reply {'verdict', 'reward', 'rule'}, where 'rule' is a phrase with the reward.

  The reward function gets the same four values as keywords, but None for a missing answer. It returns a number or a
  bool. A sample is right if the reward is 1.0 or more. A sample is undecided if the reward function raises an
  exception, or if the reward isn't finite.

  name: FILE.py:FUNCTION or MODULE:FUNCTION.
  """
  import importlib.util

  place, _, function = name.rpartition(':')
  spec = (importlib.util.spec_from_file_location('user_reward', place) if place.endswith('.py')
          else importlib.util.find_spec(place))
  if spec is None:
    raise ImportError(f'there is no {place}')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  score = getattr(module, function)

  def grade(request):
    reward = float(score(text=request['text'], answer=request['answer'] or None, reference=request['reference'],
                         question=request['question']))
    if not math.isfinite(reward):
      raise ValueError(f'it returned {reward}')
    return {'verdict': RIGHT if reward >= 1 else WRONG, 'reward': reward, 'rule': f'{function} returned {reward:g}'}

  return grade


def _grader(kind: str):
  if kind.startswith('reward '):
    return reward_grader(kind.removeprefix('reward '))
  return {'math': math_grader, 'reasoning_gym': reasoning_gym_grader}[kind]()


def main() -> None:
  kind, memory_mb, cpu_s = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
  # The pipes get other descriptors than 0 and 1, so that the output of a library's print isn't taken for an answer.
  requests, answers = os.fdopen(os.dup(0), 'rb'), os.fdopen(os.dup(1), 'wb')
  null = os.open(os.devnull, os.O_RDWR)
  for fd in (0, 1, 2):
    os.dup2(null, fd)

  def say(**message):
    answers.write(json.dumps(message).encode() + b'\n')
    answers.flush()

  try:
    grade = _grader(kind)
  except ImportError as error:
    package = {'math': 'math-verify', 'reasoning_gym': 'reasoning-gym'}.get(kind)
    say(error=f'{error}; pip install {package}' if package else str(error))
    return
  except Exception as error:  # the user's module may raise anything while it is loaded
    say(error=f'{type(error).__name__}: {error}')
    return
  _limit(memory_mb)
  sys.addaudithook(_audit)
  say(ready=True)
  for line in requests:
    request = json.loads(line)
    _limit_cpu(cpu_s)
    try:
      reply = grade(request)
    except (MemoryError, RecursionError):
      reply = {'verdict': UNDECIDED, 'rule': 'it takes too much memory', 'why': 'crashes'}
    except Exception as error:  # a scorer may raise anything for an answer that it can't read; so may a reward function
      verdict = WRONG if kind == 'reasoning_gym' else UNDECIDED
      reply = {'verdict': verdict, 'rule': f'{type(error).__name__}: {error}'[:300], 'why': 'errors'}
    say(token=request['token'], **reply)


if __name__ == '__main__':
  main()
