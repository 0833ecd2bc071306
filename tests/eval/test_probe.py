"""Tests that the probe's figures equal those computed from all logits at once, for any batch size and mesh."""

import itertools
import json
import math
import os
import socket
import subprocess

import jax
import numpy as np
import pytest
from etils import epath

from betarank import model
from betarank.configs import common, load
from betarank.configs.errors import UserError
from betarank.configs.sections import section
from betarank.data import Batch, DataError
from betarank.eval import command, probe
from betarank.model import MeshConfig, ModelConfig
from betarank.objectives import leaders
from betarank.runtime import workdir
from tests import parameters, tiny
from tests.runs import BETARANK, betarank, environment, finish, free_port, last_error

V, HEAD = 384, 10
C = section(ModelConfig, tiny.get_config().model)


@pytest.fixture(scope='module')
def params():
  """Returns parameters twice as large as fresh ones, so that ranks, entropies and confidences have a wide range."""
  return jax.device_get(parameters.random(C, scale=2.0))


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  shape = (8, 40)
  segments = np.ones(shape, np.int32)
  segments[:, 20:] = 2
  segments[0, 35:] = segments[5] = 0
  position = np.arange(40) % 20
  return Batch(rng.integers(0, V, shape, np.int32), rng.integers(0, V, shape, np.int32),
               np.broadcast_to(position, shape).astype(np.int32), segments)


def one_device():
  return model.make_mesh(MeshConfig(1, 1, 1, 1, 1), jax.devices()[:1])


def values(params, batch, mesh):
  with jax.set_mesh(mesh):
    return jax.device_get(jax.jit(probe.token_values, static_argnums=(0, 1))(C, HEAD, params, batch))


def flat(values, batch):
  np.testing.assert_array_equal(values['counts'], batch.segments_BT > 0)
  return {name: x[values['counts']] for name, x in values.items()}


@pytest.fixture(scope='module')
def computed(params, batch):
  return values(params, batch, one_device())


def test_figures_equal_brute_force_from_full_logits(params, batch, computed):
  with jax.set_mesh(one_device()):
    hidden = model.forward(C, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)[0]
    head = model.head(C, params)
  mask = batch.segments_BT > 0
  z = np.asarray(hidden, np.float64)[mask] @ np.asarray(head, np.float64)
  x = batch.targets_BT[mask]
  n = len(x)
  logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
  p, order = np.exp(logp), np.argsort(-z, axis=-1, kind='stable')
  entropy = -(p * logp).sum(-1)
  rank = np.argmax(order == x[:, None], -1)
  at = lambda ids: np.take_along_axis(p, ids, -1)
  wrong = lambda ids: np.where(ids == x[:, None], 0, at(ids)).sum(-1)
  surprise = -np.log(at(x[:, None])[:, 0])
  top = at(order[:, :2])
  bytes_N = np.arange(n) % 5

  f = probe.figures(flat(computed, batch), bytes_N, V)
  close = lambda name, value: np.testing.assert_allclose(f[name], value, rtol=2e-5, atol=1e-7, err_msg=name)
  assert f['tokens'] == n == mask.sum()
  close('ce_nats', surprise.mean())
  close('bits_per_byte', surprise.sum() / bytes_N.sum() / math.log(2))
  close('perplexity', np.exp(surprise.mean()))
  close('entropy_nats', entropy.mean())
  close('entropy_top20_nats', np.sort(entropy)[::-1][:round(n / 5)].mean())
  close('rank1_accuracy', (rank == 0).mean())
  close('head_mass', wrong(order[:, :HEAD]).mean())
  close('tail_mass', wrong(order[:, HEAD:]).mean())
  close('top_gap_nats', np.log(top[:, 0] / top[:, 1]).mean())
  for q, value in f['entropy_quantiles'].items():
    assert value == pytest.approx(np.quantile(entropy, float(q)), rel=2e-5)
  assert f['coverage'] == {str(2**i): np.mean(1 / at(x[:, None])[:, 0] >= 2**i) for i in range(1, 10)}
  for name, of in (('rank_histogram', rank), ('entropy_histogram', entropy)):
    edges, counts = f[name]['edges'], f[name]['counts']
    assert counts == [int(((of >= a) & (of < b)).sum()) for a, b in itertools.pairwise(edges)] and sum(counts) == n
  assert f['rank_histogram']['edges'][:5] == [0, 1, 2, 4, 8]
  c = f['calibration']
  ece = 0.0
  for i, (a, b) in enumerate(itertools.pairwise(c['edges'])):
    inside = (top[:, 0] >= a) & ((top[:, 0] < b) | (b == 1))
    assert c['counts'][i] == inside.sum()
    if not inside.any():
      assert c['confidence'][i] is c['accuracy'][i] is None
      continue
    assert c['confidence'][i] == pytest.approx(top[inside, 0].mean(), rel=2e-5)
    assert c['accuracy'][i] == pytest.approx((rank[inside] == 0).mean(), rel=1e-9)
    ece += inside.mean() * abs(top[inside, 0].mean() - (rank[inside] == 0).mean())
  close('ece', ece)
  assert sum(count > 0 for count in c['counts']) > 3 and (rank == 0).any()  # else little was tested
  json.dumps(f, allow_nan=False)


def test_padding_counts_for_nothing(params, batch, computed):
  dead = batch.segments_BT == 0
  other = Batch(np.where(dead, 7, batch.tokens_BT), np.where(dead, V + 9, batch.targets_BT), batch.positions_BT,
                batch.segments_BT)
  got = flat(values(params, other, one_device()), batch)
  for name, want in flat(computed, batch).items():
    np.testing.assert_array_equal(got[name], want, err_msg=name)


@pytest.mark.parametrize('axes', [
  pytest.param(dict(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow), dict(fsdp=2, context=2, tensor=2)])
def test_eight_devices_equal_one(params, batch, computed, axes):
  mesh = model.make_mesh(MeshConfig(**{**dict(data=1, fsdp=1, expert=1, context=1, tensor=1), **axes}))
  placed = jax.device_put(params, model.shardings(mesh, model.abstract(C)[2]))
  got = values(placed, batch, mesh)
  for name, want in flat(computed, batch).items():
    # Logits are about 20 in size: a gap between two is right to a few times 2e-6, however small it is.
    np.testing.assert_allclose(flat(got, batch)[name], want, rtol=1e-4, atol=1e-4, err_msg=name)


def test_leaders_do_not_depend_on_chunks(monkeypatch, params, batch, computed):
  monkeypatch.setattr(leaders, 'CHUNK_TOKENS', 7)
  got = flat(values(params, batch, one_device()), batch)
  for name in ('top_logp', 'gap'):
    np.testing.assert_allclose(got[name], flat(computed, batch)[name], rtol=1e-5, atol=1e-6)


# The command, on the eight devices that are here


@pytest.fixture
def run_probe(run_dir, capsys):
  """Returns a function (*flags) that runs the command and returns its output."""
  def run(*flags, checkpoint=''):
    command.main(['probe', f'--checkpoint={run_dir / checkpoint}', *flags])
    return capsys.readouterr().out
  return run


def test_all_checkpoints_of_a_run_are_probed_once_on_the_same_tokens(run_dir, run_probe):
  run_probe('--all', '--config.eval.probe.rows=5')
  results = [json.loads((run_dir / f'eval/probe/{step}.json').read_text()) for step in (4, 8)]
  assert [r['step'] for r in results] == [4, 8] and results[0]['deciding'] == results[1]['deciding']
  assert results[0]['checkpoint'].endswith('checkpoints/4') and results[0]['config']['probe']['top_k'] == 10
  a, b = (r['domains']['main'] for r in results)
  assert a['tokens'] == b['tokens'] > 100 and a['ce_nats'] != b['ce_nats'] > math.log(V)  # nobody trained it
  # Other rows at once: the same tokens, so there is nothing to do. More rows: done again.
  assert 'is there already' in run_probe('--config.eval.probe.rows=5', '--config.eval.probe.batch_size=16')
  assert 'written' in run_probe('--config.eval.probe.rows=8')
  assert json.loads((run_dir / 'eval/probe/8.json').read_text())['domains']['main']['tokens'] > b['tokens']


@pytest.mark.parametrize(
  'checkpoint, flag, message',
  [
    ('', '--config.eval.probe.rows=0', 'config.eval.probe.rows must be >= 1'),
    ('', '--config.eval.prob.rows=1', 'did you mean config.eval.probe.rows?'),
    ('', '--config.eval.probe.batch_size=4', 'config.eval.probe.batch_size must be a multiple of'),
    ('', '--config.model.heads=2', 'config.model.heads must be 4'),
    ('', '--config.train.mesh.fsdp=3', 'config.train.mesh: mesh:'),
    ('', '--config.data.dir=/nowhere', '/nowhere/tokenizer.model: no such tokenizer'),
    ('', '--config=tests/nowhere.py', '--config=tests/nowhere.py: no such file'),
    ('checkpoint', '--all', 'checkpoint: no such folder; did you mean'),
  ],
)
def test_what_cannot_be_is_refused_in_one_line(run_probe, checkpoint, flag, message):
  with pytest.raises((UserError, DataError)) as error:
    run_probe(flag, checkpoint=checkpoint)
  assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.slow
def test_two_processes_equal_one(run_dir, run_probe):
  path = run_dir / 'eval/probe/4.json'
  run_probe('--config.eval.probe.rows=7', checkpoint='checkpoints/4')
  want = json.loads(path.read_text())
  path.unlink()
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  command = [*BETARANK, 'eval', 'probe', f'--checkpoint={run_dir}/checkpoints/4',
             '--config.eval.probe.rows=7', f'--coordinator=127.0.0.1:{port}', '--processes=2']
  pair = [subprocess.Popen([*command, f'--process_id={i}'], env=environment(2), text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE) for i in range(2)]
  (out, err), (silent, _) = [process.communicate(timeout=240) for process in pair]
  assert pair[0].returncode == 0 and 'written' in out and 'written' not in silent, err
  got = json.loads(path.read_text())
  assert got['deciding'] == want['deciding']
  for name, value in want['domains']['main'].items():
    if isinstance(value, float | int):
      assert got['domains']['main'][name] == pytest.approx(value, rel=1e-4), name


def test_a_second_evaluation_is_refused_in_all_processes(tmp_path):
  """Only process 0 locks the folder. The others would wait for it, and name a lost process."""
  for item in ('state', 'meta'):
    (tmp_path / 'checkpoints' / '1' / item).mkdir(parents=True)
  (tmp_path / 'checkpoints/1/meta/metadata').write_text(json.dumps(
    {'step': 1, 'shapes': {}, 'config': json.loads(load.to_json(load.load('configs/smoke.py')))}))
  job = [f'--coordinator=127.0.0.1:{free_port()}', '--processes=2']
  with workdir.claim(epath.Path(tmp_path) / 'eval', lock='.lock-probe'):
    results = finish([betarank('eval', 'probe', f'--checkpoint={tmp_path}', *job, f'--process_id={i}')
                      for i in range(2)], timeout=240)
  for code, _, err in results:
    assert code == 2 and f'{tmp_path}/eval: process {os.getpid()} on ' in last_error(err), err


def test_the_command_ends_in_one_line():
  done = subprocess.run([*BETARANK, 'eval', 'probe', '--checkpoint=nowhere'], capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr == 'error: nowhere: no such folder\n'


def test_section_eval_is_what_the_command_adds(run_dir):
  from betarank.eval import config as settings

  [subject] = settings.find_checkpoints(str(run_dir))
  assert settings.configure(subject).eval == common.evaluation()
  assert settings.eval_run(settings.configure(subject), subject).eval.sample.samples == 128  # the paper's
