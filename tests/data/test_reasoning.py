import pytest

from data import reasoning
from data.config import DataError

TASKS = reasoning.DEFAULT_TASKS


def test_a_problem_depends_on_its_index_alone():
  once = [reasoning.problem(TASKS, i).document for i in (0, 1, 2, 3, 5000, 9)]
  reasoning._block.cache_clear()
  assert [reasoning.problem(TASKS, i).document for i in (0, 1, 2, 3, 5000, 9)] == once


def test_document_is_prompt_and_completion():
  for i in range(40):
    p = reasoning.problem(TASKS, i)
    completion = reasoning.COMPLETION.format(solution=p.solution, answer=p.answer)
    assert p.document == p.prompt + completion and p.solution
    assert p.document.rpartition(reasoning.ANSWER_MARK)[2] == p.answer + '\n'


@pytest.mark.parametrize('task', TASKS)
def test_worked_solutions_reach_the_answer(task):
  for i in range(200):
    p = reasoning.problem((task,), i)
    last = p.solution.split('\n')[-1]
    if task in ('chain_sum', 'products'):
      assert last.endswith(f'= {p.answer}')
    if task == 'gcd':
      assert last.endswith(f'mod {p.answer} = 0')
    for line in p.solution.split('\n') if task != 'gsm_symbolic' else ():
      left, _, right = line.partition(' = ')
      assert eval(left.replace('mod', '%')) == int(right)  # our own arithmetic, checked by Python's


def test_streams_and_unworked_tasks():
  assert reasoning.problem(TASKS, 3).question != reasoning.problem(TASKS, 3, stream='rl').question
  assert reasoning.problem(('leg_counting',), 0).document.count('Solution:\nAnswer: ') == 1


def test_unknown_task():
  with pytest.raises(DataError, match=r"no task 'chain_sums'; did you mean chain_sum\?"):
    reasoning.check_tasks(['chain_sums'])
