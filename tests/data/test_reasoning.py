import pytest

from betarank.data import reasoning
from betarank.data.config import DataError

TASKS = tuple(reasoning.TASKS)
KINDS = reasoning.parse('')


def test_a_problem_depends_on_its_index_alone():
  once = [reasoning.problem(KINDS, i).document for i in (0, 1, 2, 3, 5000, 9)]
  reasoning._block.cache_clear()
  assert [reasoning.problem(KINDS, i).document for i in (0, 1, 2, 3, 5000, 9)] == once


def test_document_is_prompt_and_completion():
  for i in range(40):
    p = reasoning.problem(KINDS, i)
    completion = reasoning.COMPLETION.format(solution=p.solution, answer=p.answer)
    assert p.document == p.prompt + completion and p.solution
    assert p.document.rpartition(reasoning.ANSWER_MARK)[2] == p.answer + '\n'


@pytest.mark.parametrize('task', TASKS)
def test_worked_solutions_reach_the_answer(task):
  kind = reasoning.parse(task)
  for i in range(200):
    p = reasoning.problem(kind, i)
    last = p.solution.split('\n')[-1]
    if task in ('chain_sum', 'products'):
      assert last.endswith(f'= {p.answer}')
    if task == 'gcd':
      assert last.endswith(f'mod {p.answer} = 0')
    for line in p.solution.split('\n') if task != 'gsm_symbolic' else ():
      left, _, right = line.partition(' = ')
      assert eval(left.replace('mod', '%')) == int(right)  # our own arithmetic, checked by Python's


def test_streams_and_unworked_tasks():
  assert reasoning.problem(KINDS, 3).question != reasoning.problem(KINDS, 3, stream='rl').question
  assert reasoning.problem(reasoning.parse('leg_counting'), 0).document.count('Solution:\nAnswer: ') == 1


def test_the_uri_sets_the_difficulty_of_each_task():
  """Three kinds of problems take turns: sums of two digits, sums with the default options, and products.

  Every solution ends with the answer.
  """
  easy, default, _ = kinds = reasoning.parse('chain_sum?max_terms=2&max_digits=1+chain_sum+products?max_terms=3')
  assert (easy.options, default.options) == ({'max_terms': 2, 'max_digits': 1}, {'max_terms': 4, 'max_digits': 2})
  problems = [reasoning.problem(kinds, i) for i in range(300)]
  assert {len(p.solution.split('\n')) for p in problems[::3]} == {1}
  assert all(len(number) == 1 for p in problems[::3] for number in p.entry['metadata']['expression'].split()[::2])
  assert {len(p.solution.split('\n')) for p in problems[1::3]} == {1, 2, 3}
  assert {p.entry['metadata']['expression'].count('*') for p in problems[2::3]} == {1, 2}
  assert all(p.solution.endswith(f'= {p.answer}') for p in problems)
  assert reasoning.parse('chain_sum?level=3&min_terms=5')[0].options['min_terms'] == 5


@pytest.mark.parametrize('rest,message', [
  ('chain_sums', r"chain_sums: reasoning-gym has no task 'chain_sums'; did you mean chain_sum\? There are ab, "),
  ('gcd+chain_sum?max_term=3', r"chain_sum has no option 'max_term'; did you mean max_terms\? There are "
   'allow_negation, level, max_digits, max_terms, min_digits, min_terms$'),
  ('chain_sum?size=3', "no option 'size'"), ('chain_sum?max_terms=1', 'max_terms must be >= min_terms'),
  ('chain_sum?max_terms=x', "reasoning:chain_sum\\?max_terms=x: '[<>]=?' not supported"),
  ('gsm_symbolic?level=1', 'level must be a whole number >= 0, of a task with a curriculum'),
  ('codeio', 'it runs stored programs'), ('chain_sum+', "reasoning-gym has no task ''"),
])
def test_what_reasoning_gym_does_not_have_is_named(rest, message):
  with pytest.raises(DataError, match=message) as error:
    reasoning.parse(rest)
  assert '\n' not in str(error.value)


def test_a_held_out_share_holds_every_smaller_one():
  questions = [reasoning.problem(KINDS, i).question for i in range(400)]
  shares = [{q for q in questions if reasoning.held_out(q, fraction)} for fraction in (0.0, 0.1, 0.3, 1.0)]
  assert not shares[0] and shares[1] < shares[2] < shares[3] == set(questions)
  assert 20 < len(shares[1]) < 60 and reasoning.held_out(questions[0].upper() + ' ', 0.3) == (questions[0] in shares[2])
