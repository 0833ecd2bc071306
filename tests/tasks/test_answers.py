"""Tests where the final answer of a text is found. RL, evaluation and `betarank judge` use the same function."""

import dataclasses
import time

import pytest

from betarank.tasks.answers import final_answer, last_boxed
from betarank.tasks.records import Task

LINE = Task('', '', '', '', 'math', 'line')
BOXED = dataclasses.replace(LINE, answer_format='boxed')


@pytest.mark.parametrize('text,expected', [
  (' 1 + 1 = 2\nAnswer: 2\n', '2'), ('\nAnswer: 2', '2'), ('Answer: 2', None), ('\nAnswer: \n', None), ('', None),
  ('\nAnswer: 2\nQuestion: next\nSolution: x\nAnswer: 3', '2'), ('\nAnswer:  a b \nc', 'a b'),
])
def test_answer_on_a_line(text, expected):
  assert final_answer(text, LINE) == expected


def test_answer_of_several_lines():
  text = '\nAnswer: 1 2\n3 4\n\nQuestion:'
  assert final_answer(text, dataclasses.replace(LINE, answer_lines=2)) == '1 2\n3 4'
  assert final_answer(text, dataclasses.replace(LINE, answer_lines=0)) == '1 2\n3 4\n\nQuestion:'


@pytest.mark.parametrize('text,expected', [
  (r'so \boxed{2}.', '2'), (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'), (r'\boxed{1} then \boxed{2}', '2'),
  (r'\boxed{1} then \boxed{2', '1'), (r'\boxed 7', '7'), (r'\framebox{204}', '204'), (r'\boxed{\{1,2\}}', r'\{1,2\}'),
  (r'\boxed{}', None), ('no box', None), ('\\boxed', None), (r'\fbox{3}', '3'),
])
def test_answer_in_a_box(text, expected):
  assert final_answer(text, BOXED) == expected == last_boxed(text)


@pytest.mark.parametrize('text,expected', [
  (r'\boxed{1} and \boxed{2}', '1, 2'), (r'$\boxed{1}$, $\boxed{2}$ and $\boxed{3}$', '1, 2, 3'),
  (r'x = \boxed{1} or x = \boxed{2}', '1, 2'), (r'x_1 = \boxed{1}, \quad x_{2} = \boxed{2}', '1, 2'),
  ('\\[\\boxed{1}\\]\n\\[\\boxed{2}\\]', '1, 2'), (r'\boxed{1} \text{ and } \boxed{2}', '1, 2'),
  (r'\boxed{2} and again \boxed{2}', '2'), (r'\boxed{7} or \boxed{7}', '7'),
  (r'First \boxed{1}. Therefore \boxed{2}', '2'), (r'so 3 \boxed{1}, which gives \boxed{2}', '2'),
  (r'\boxed{\boxed{1}, \boxed{2}}', '1, 2'),
])
def test_boxes_that_are_one_answer(text, expected):
  """Boxes are one answer if only 'and', 'or', commas and names are between them. A box of an earlier step doesn't
  belong to it.
  """
  assert last_boxed(text) == expected


def test_a_question_of_the_models_own_is_not_answered():
  """A base model that doesn't stop continues with a new question in the form of the prompt, with or without worked
  examples.
  """
  prompt = 'Question: 1+1\nSolution: 2\n\nQuestion: What is 2+2?\nSolution:'
  task = dataclasses.replace(BOXED, question='What is 2+2?', prompt=prompt)
  text = ' It is \\boxed{4}.\n\nQuestion: What is 3+4?\nSolution: It is \\boxed{7}.'
  assert final_answer(text, task) == '4'
  assert final_answer(text, dataclasses.replace(task, prompt='What is 2+2?')) == '7'  # nothing opens a question
  assert final_answer(text.replace('Question', 'question'), task) == '7'


def test_an_answer_on_a_line_to_a_question_of_the_models_own_does_not_count():
  """If it did, RL could reward a model for asking itself a question with the same answer."""
  task = dataclasses.replace(LINE, question='What is 2+2?', prompt='Question: What is 2+2?\nSolution:')
  own = '\n\nQuestion: What is 1+3?\nSolution: It is 4.\nAnswer: 4\n'
  assert final_answer(f' I do not know.{own}', task) is None
  assert final_answer(f' It is 4.\nAnswer: 4{own}', task) == '4'
  assert final_answer(f'\nAnswer: 1 2\n3 4{own}', dataclasses.replace(task, answer_lines=0)) == '1 2\n3 4'


@pytest.mark.parametrize('opening', ['*', '1)', '###'])
def test_a_list_is_no_question_of_the_models_own(opening):
  task = dataclasses.replace(LINE, question='What is 2+2?', prompt=f'{opening} What is 2+2?')
  steps = f'\n{opening} add\n{opening} 2 and 2'
  assert final_answer(f'{steps}\nAnswer: 4', task) == '4'
  assert final_answer(f'{steps}\n\\boxed{{4}}', dataclasses.replace(task, answer_format='boxed')) == '4'


def test_programs():
  whole = dataclasses.replace(LINE, answer_format='code')
  assert final_answer('x = 1\n[DONE]\nprint(x)', whole) == 'x = 1'
  rest = dataclasses.replace(whole, entry='def f():\n')
  assert final_answer('  return (\n  1\n)\n\nprint(2)', rest) == '  return (\n  1\n)\n\n'


@pytest.mark.parametrize('text', ['\\boxed{' * 5000, '\\boxed{1}' * 5000, '{' * 10_000, 'x = ' * 2000 + '\\boxed{1}',
                                  '\\boxed{1}' + ' and x_1 =' * 2000 + '\\boxed{2}'])
def test_long_texts_take_no_long_time(text):
  """The time is linear in the length of the text, or bounded, because the regular expressions don't backtrack."""
  for task in (LINE, BOXED):
    began = time.thread_time()
    final_answer(text, task)
    assert time.thread_time() - began < 1
