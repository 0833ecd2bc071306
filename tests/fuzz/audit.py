"""Lists what compiles, runs or unpickles anything while every kind of input is loaded: python -m tests.fuzz.audit

An audit hook receives every such event of the interpreter, from any library. All input contains a marker, which is in
Python code that would create a file if it ran. Prints, as JSON, the events of each step except imports, and the
compiled or executed texts that contain the marker.
"""

import collections
import json
import os
import pathlib
import sys
import tempfile

from tests import offline

MARK = 'zqcanary'
STARTS = ('os.system', 'os.exec', 'os.fork', 'os.forkpty', 'os.posix_spawn', 'os.spawn', 'os.startfile', 'pty.spawn',
          'subprocess.Popen')
WATCHED = ('compile', 'exec', 'pickle.find_class', 'code.__new__', *offline.EVENTS, *STARTS)


class Audit:
  """An audit hook, which is active once the object is created.

  Attributes:
    step: the name under which the next events are recorded.
    events: {step: {(event, module that caused it)}}.
    marked: the compiled or executed texts that contain MARK.
    sources: {step: texts that were compiled}.
  """

  def __init__(self):
    self.step, self.events, self.marked = 'import', collections.defaultdict(set), []
    self.sources: dict[str, list[str]] = collections.defaultdict(list)
    sys.addaudithook(self._hook)

  def _hook(self, event: str, args: tuple) -> None:
    if event not in WATCHED:
      return
    frame = sys._getframe(1)
    who = frame.f_globals.get('__name__', '?')
    if event in ('compile', 'exec') and who.startswith(('importlib.', '_frozen_importlib', 'zipimport')):
      return
    text = repr(args)
    if event == 'exec':  # the names and constants of the code, and of functions in it
      text = repr(_contents(args[0]))
    if event == 'compile' and args[0] is not None:
      text = args[0].decode(errors='replace') if isinstance(args[0], bytes) else str(args[0])
      self.sources[self.step].append(text)
    detail = f' {args[1]}' if event == 'subprocess.Popen' else f' {args}' if event in STARTS else ''
    self.events[self.step].add((event, who + detail))
    if MARK in text:
      self.marked.append((self.step, event, who, text[:200]))


def _contents(code) -> list:
  inner = [_contents(c) for c in code.co_consts if hasattr(c, 'co_consts')]
  return [code.co_names, [c for c in code.co_consts if not hasattr(c, 'co_consts')], inner]


def hostile(folder: pathlib.Path) -> str:
  return f"{MARK} __import__('os').system('touch {folder}/{MARK}')"


def load_config(folder: pathlib.Path):
  """Loads a config that was written as a run writes it. Its name, values and folder contain the marker."""
  from betarank.configs import load
  from betarank.train.config import run_config

  config = load.load(f'tests/tiny.py:dir={folder}/{MARK}')
  path = folder / f'{MARK}.json'
  path.write_text(load.to_json(config))
  config = load.load(str(path), {'train.init_from': hostile(folder)})
  run_config(config)
  return config


def write_sources(folder: pathlib.Path) -> dict[str, str]:
  """Writes the same documents, which contain the marker, in every format. Returns {name: URI}."""
  import numpy as np
  import pyarrow
  import pyarrow.parquet
  import tensorflow_datasets as tfds
  from array_record.python.array_record_module import ArrayRecordWriter

  from betarank.data.records import to_record

  documents = [f'document {i}: {i} + 1 = {i + 1}\n{hostile(folder)}\n' for i in range(60)]
  (folder / 'x.txt').write_text(''.join(documents))
  (folder / 'x.jsonl').write_text(''.join(json.dumps({'text': d, MARK: hostile(folder)}) + '\n' for d in documents))
  pyarrow.parquet.write_table(pyarrow.table({'text': documents}), folder / 'x.parquet')
  place = folder / MARK / '1.0.0'
  place.mkdir(parents=True)
  for path, pack in ((folder / 'x.array_record', str.encode), (
      place / f'{MARK}-train.array_record-00000-of-00001',
      lambda document: to_record(np.frombuffer(document.encode(), np.uint8)))):
    writer = ArrayRecordWriter(str(path), 'group_size:1')
    for document in documents:
      writer.write(pack(document))
    writer.close()
  name = tfds.core.ShardedFileTemplate(data_dir=place, dataset_name=MARK, filetype_suffix='array_record', split='train')
  tfds.folder_dataset.write_metadata(
    data_dir=place, features=tfds.features.FeaturesDict({'tokens': tfds.features.Text()}), version='1.0.0',
    split_infos=[tfds.core.SplitInfo(name='train', filename_template=name, shard_lengths=[60], num_bytes=9000)],
    check_data=False)
  return {'text': f'text:{folder}/x.txt', 'jsonl': f'jsonl:{folder}/x.jsonl', 'parquet': f'parquet:{folder}/x.parquet',
          'arrayrecord': f'arrayrecord:{folder}/x.array_record', 'tfds': f'tfds:{place}#tokens',
          'reasoning': 'reasoning:chain_sum'}


def prepare(folder: pathlib.Path, uris: dict[str, str]):
  """Trains a tokenizer, prepares the sources, reads a document of each, and encodes the marker.

  uris: {name of a source: its URI}.
  """
  from betarank.data.config import DataConfig, SourceConfig
  from betarank.data.prepare import prepare_source
  from betarank.data.prepared import Documents
  from betarank.data.tokenizer import read_tokenizer
  from betarank.data.tokenizer_training import train_tokenizer

  config = DataConfig(str(folder / 'data'), '', 384, {name: SourceConfig(uri, 1.0, 50) for name, uri in uris.items()},
                      0.0, 32)
  train_tokenizer(config)
  for name in uris:
    prepare_source(config, name, workers=1)
    Documents(config, name, 'train').read([0])
  tokenizer = read_tokenizer(config.tokenizer_path)
  tokenizer.decode(tokenizer.encode(hostile(folder)))
  return config


def restore_checkpoint(folder: pathlib.Path, config, tokenizer: str) -> None:
  """Saves and restores a checkpoint that contains the marker, and converts it to Hugging Face's format and back."""
  import jax

  from betarank import model
  from betarank.configs import load
  from betarank.data.tokenizer import read_tokenizer
  from betarank.runtime import checkpoint
  from betarank.runtime.state import create_state
  from betarank.train import hf
  from betarank.train.config import run_config
  from betarank.train.optimizer import make_optimizer

  run = run_config(config)
  mesh = model.make_mesh(run.train.mesh, jax.devices()[:1])
  with jax.set_mesh(mesh):
    state = create_state(run.model, make_optimizer(run.optimizer, run.steps, model.abstract(run.model)[2]), mesh, 0)
    keep = checkpoint.Checkpoints(folder / 'run', run.checkpoint)
    keep.save(state, {'config': json.loads(load.to_json(config)), 'parent': hostile(folder), 'cursor': {MARK: 1},
                      'code_version': MARK}, 1)
    keep.close()
    checkpoint.restore(checkpoint.find(str(folder / 'run')), state)
  hf.export(str(folder / 'run'), str(folder / 'hf'), tokenizer_path=tokenizer)
  path = folder / 'hf' / 'config.json'
  theirs = json.loads(path.read_text())
  path.write_text(json.dumps({**theirs, 'auto_map': {'AutoModel': f'{MARK}.Model'}, MARK: hostile(folder)}))
  path = folder / 'hf' / 'tokenizer_config.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), 'auto_map': {
    'AutoTokenizer': [f'{MARK}.Tokenizer', None]}, 'chat_template': hostile(folder)}))
  (folder / 'hf' / f'{MARK}.py').write_text(hostile(folder))
  hf.import_(str(folder / 'hf'), str(folder / 'imported'))
  json_tokenizer = read_tokenizer(str(folder / 'imported' / 'tokenizer'))
  json_tokenizer.decode(json_tokenizer.encode(hostile(folder)))


def answers(folder: pathlib.Path) -> list[str]:
  text = hostile(folder)
  return [text, MARK, f'{MARK}(1)', f'"{MARK}"', rf'\text{{{MARK}}}', rf'\operatorname{{{MARK}}}(x)',
          rf'\frac{{{MARK}}}{{2}}', f'[{MARK}]', f'({MARK}, 1)', f'x + {MARK}', rf'{MARK} = 3', f'{{{MARK}}}',
          'lambda: ' + MARK, f'f"{{{MARK}}}"', rf'\left({text}\right)', f'1 + 1 if {MARK} else 2', '2*x + 1', '3/4',
          r'\frac{1}{2}x^2', '10!', 'sin(x)**2', '5%']


def grade(folder: pathlib.Path) -> None:
  """Grades the answers with the marker by a Verifier, as RL does."""
  from betarank.tasks.task_set import Task, TaskConfig, TaskSet
  from betarank.tasks.verifiers import Verifier, VerifierConfig

  game = TaskSet(TaskConfig('reasoning:countdown'))[0]
  items = [(f'\nAnswer: {answer}', task) for answer in answers(folder)
           for task in (Task('', '', '', '2x+1', 'math', 'line'), game)]
  with Verifier(VerifierConfig(workers=1)) as verifier:
    verifier.verify(items)
    assert not verifier.counts['refused'], verifier.counts


def grade_as_a_worker(folder: pathlib.Path, audit: Audit) -> None:
  """Grades the answers with the marker in this process, as a worker does.

  This must be the last step, because it changes SymPy's parser.
  """
  from betarank.tasks import verifier_worker
  from betarank.tasks.task_set import TaskConfig, TaskSet

  game = TaskSet(TaskConfig('reasoning:countdown'))[0]
  graders = (verifier_worker.math_grader(), ''), (verifier_worker.reasoning_gym_grader(), game.entry)
  for audit.step in ('worker, first', 'worker'):  # the first pass has the libraries' late imports
    for grader, entry in graders:
      for answer in answers(folder):
        try:
          grader({'answer': answer, 'reference': '2x+1', 'entry': entry})
        except Exception:  # an error in a library, which the worker's main catches too
          continue


def report(folder: pathlib.Path) -> None:
  from betarank.eval.report.command import write_report

  run = folder / 'sweep' / MARK
  run.mkdir(parents=True)
  (run / 'config.json').write_text((folder / f'{MARK}.json').read_text())
  (run / 'metrics.jsonl').write_text(''.join(
    json.dumps({'step': i, 'train/ce_nats': 1.0, f'train/{hostile(folder)}': 1.0}) + '\n' for i in range(1, 4)))
  (run / 'samples.jsonl').write_text(json.dumps({'step': 3, 'prompt': hostile(folder), 'text': MARK}) + '\n')
  write_report(str(folder / 'sweep'))


def main() -> None:
  os.environ['JAX_PLATFORMS'] = 'cpu'
  audit = Audit()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    audit.step = 'make'
    uris = write_sources(folder)
    audit.step = 'config'
    config = load_config(folder)
    audit.step = 'data'
    prepared = prepare(folder, uris)
    config = config.copy_and_resolve_references()
    config.train.init_from = ''
    audit.step = 'checkpoint'
    restore_checkpoint(folder, config, prepared.tokenizer_path)
    audit.step = 'grade'
    grade(folder)
    audit.step = 'report'
    report(folder)
    audit.step = 'worker, start'
    grade_as_a_worker(folder, audit)
    touched = (folder / MARK / MARK).exists() or (folder / MARK).is_file()
  compiled = sorted(source for source in set(audit.sources['worker']) if not source.startswith('(\'countdown'))
  events = {step: sorted(f'{event} by {who}' for event, who in found) for step, found in audit.events.items()}
  json.dump({'events': events, 'marked': audit.marked, 'touched': touched, 'compiled by the worker': compiled},
            sys.stdout, indent=1)


if __name__ == '__main__':
  main()
