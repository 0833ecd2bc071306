"""Measures a checkpoint's predictions on a fixed set of tokens, for each domain: confidence, accuracy and entropy.

A domain is a source of the data. Its tokens are the first rows of the source's validation split. Checkpoints whose
configs have the same section `data` are measured on the same tokens, and RUN/eval/probe/STEP.json has a hash of the
tokens.

One forward pass gives a few values per token. The logits are computed in chunks, so that they are never in memory all
at once. All metrics are then computed from these values in float64. Each file is written atomically, so if a probe is
killed, only the checkpoint in progress must be measured again.

# B rows  T tokens of a row  N tokens of a domain  D width  V vocabulary  E edges of bins (bins: E - 1)
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from betarank import data, model
from betarank.configs.files import read_json, write_atomically
from betarank.configs.terminal import columns, fitted, waiting
from betarank.data import Batch
from betarank.eval.config import CheckpointRef, EvalError, EvalRun, make_mesh, read_tokenizer, restore
from betarank.model.sharding import constrain
from betarank.runtime import multihost
from betarank.train import score, setup

HIGH_ENTROPY_SHARE = 0.2  # the share of tokens at which reasoning branches (arXiv 2506.01939)
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
COVERAGE_N = tuple(2**i for i in range(1, 15))
ENTROPY_BINS = 40  # bins of equal width in [0, log V]
CONFIDENCE_BINS = 15  # bins of equal width in [0, 1], the usual number for ECE


def probe(run: EvalRun, subjects: Sequence[CheckpointRef], stop: Callable[[], None] = lambda: None) -> None:
  """Measures each checkpoint, prints its main metrics, and writes all metrics to RUN/eval/probe/STEP.json.

  A checkpoint is skipped if its file already exists and was made from the same tokens with the same settings.

  stop: a function that is called before each checkpoint. It may raise an error to end the work.

  Raises:
    ConfigError, DataError, CheckpointError or EvalError: a checkpoint, a setting or the data can't be used.
  """
  c, settings = run.model, run.eval.probe
  head = min(settings.top_k or run.top_k, c.vocab_size)
  tokenizer = read_tokenizer(run, subjects[-1])
  mesh = make_mesh(run, 'eval.probe.batch_size', settings.batch_size)
  setup.check_length('data.sequence_length', run.data.sequence_length, c, mesh)
  config = {**dataclasses.asdict(run.eval), 'probe': dataclasses.asdict(settings) | {'top_k': head}}
  # The settings that determine the figures. batch_size isn't one of them: it only affects the computation.
  tokens = {name: _fingerprint(run, name) for name in run.data.sources}
  deciding = {'rows': settings.rows, 'top_k': head, 'tokens_sha256': tokens}
  paths = [subject.run / 'eval' / 'probe' / f'{subject.step}.json' for subject in subjects]
  done = np.array([(_read(path) or {}).get('deciding') == deciding for path in paths])
  done = multihost_utils.broadcast_one_to_all(done)  # several processes must agree, even if their disks differ
  say = print if jax.process_index() == 0 else lambda *_, **__: None
  with jax.set_mesh(mesh):
    values = jax.jit(token_values, static_argnums=(0, 1))
    for subject, path, there in zip(subjects, paths, done):
      if there:
        say(f'{path}: is there already')
        continue
      stop()
      began = time.perf_counter()
      with waiting(f'restoring step {subject.step}'):
        params, domains = restore(run, subject, mesh), {}
      for name in run.data.sources:
        with waiting(f'step {subject.step}: predicting {name}'):
          values_N = _gather(lambda batch, params=params: values(c, head, params, batch), run, name, mesh)
        if bad := int((~(values_N['valid'] & np.isfinite(values_N['logp']) & np.isfinite(values_N['entropy']))).sum()):
          raise EvalError(f'{subject.path}: {bad} of the {len(values_N["logp"])} tokens of {name} have a '
                          'log-probability or entropy that is no finite number')
        domains[name] = figures(values_N, tokenizer.bytes_per_token_V[values_N['target']], c.vocab_size)
        say(describe(subject, name, domains[name]), flush=True)
      if jax.process_index() == 0:
        write_atomically(path, json.dumps({
          **subject.lineage(), 'config': config, 'deciding': deciding, 'domains': domains,
                                      'seconds': round(time.perf_counter() - began, 1)}, indent=1) + '\n')
      say(f'{path}: written', flush=True)


def _gather(values: Callable[[Batch], dict], run: EvalRun, name: str, mesh: Mesh) -> dict[str, np.ndarray]:
  """Computes values per token for all batches of a source. Returns {name: array [N]}, the same in every process.

  The N positions are those at which the array 'counts' is True. Padding, and targets that the loss ignores, are left
  out.

  values: a function from a batch to {name: array [B, T]}, such as `token_values`. One of its arrays is 'counts', bool.
  name: the name of the source.
  """
  size = run.eval.probe.batch_size
  placement = NamedSharding(mesh, model.spec('batch', 'length'))
  share = multihost.row_share(placement, size, run.data.sequence_length)
  parts = []
  for batch in batches(run, name, *share):
    values_BT = jax.device_get(values(multihost.local_to_global(batch, placement, size)))
    parts.append({key: x_BT[values_BT['counts']] for key, x_BT in values_BT.items()})
  return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def batches(run: EvalRun, name: str, process: int = 0, processes: int = 1) -> Iterator[Batch]:
  """Yields the validation rows on which source `name` is measured, in batches of eval.probe.batch_size rows.

  With several processes, each process gets only its own rows of every batch. The batch size doesn't change which rows
  are measured. The last batch is filled up with rows of padding (segment 0).

  process, processes: the index of this process, and the number of processes.
  """
  rows, size = run.eval.probe.rows, run.eval.probe.batch_size
  local = size // processes
  found = data.validation_batches(run.data, name, batch_size=size, count=-(-rows // size), process_index=process,
                                  process_count=processes)
  for i, batch in enumerate(found):
    beyond_B1 = (i * size + process * local + np.arange(local) >= rows)[:, None]
    yield dataclasses.replace(batch, segments_BT=np.where(beyond_B1, 0, batch.segments_BT))


def _fingerprint(run: EvalRun, name: str) -> str:
  """Returns the sha256 of the tokens on which source `name` is measured, in hexadecimal."""
  digest = hashlib.sha256()
  for batch in batches(run, name):
    live_B = (batch.segments_BT > 0).any(1)
    counts = [] if batch.counts_BT is None else [batch.counts_BT]
    for x_BT in (batch.tokens_BT, batch.targets_BT, batch.segments_BT, *counts):
      digest.update(np.ascontiguousarray(x_BT[live_B], '<i4').tobytes())
  return digest.hexdigest()


def _read(path) -> dict[str, Any] | None:
  try:
    value = read_json(path)
  except (FileNotFoundError, ValueError):
    return None
  return value if isinstance(value, dict) else None


# On the device: a few numbers per token


def token_values(c: model.ModelConfig, head_tokens: int, params: Any, batch: Batch) -> dict[str, jax.Array]:
  """Returns {name: array [B, T]}: values per token from which all metrics are computed. The arrays are replicated on
  all devices.

  Log-probabilities and entropies are float32, in nats.

  counts: bool, True where the target counts in the loss. At other positions, such as padding, all other values are
    arbitrary.
  target: the token id of the target.
  logp, rank, valid: target_logp, target_rank and target_valid of objectives.TokenStats.
  entropy, head_mass, tail_mass: as in objectives.TokenStats. The head consists of the `head_tokens` most probable
    tokens.
  top_logp: the log-probability of the most probable token.
  gap: top_logp minus the log-probability of the second most probable token.
  """
  stats, hidden_BTD = score.token_stats(c, params, batch, head_tokens)
  top_logp, gap = score.leading_two(c, params, hidden_BTD)
  out = {'counts': batch.counted_BT, 'target': batch.targets_BT, 'valid': stats.target_valid,
         'logp': stats.target_logp, 'entropy': stats.entropy, 'rank': stats.target_rank,
         'head_mass': stats.head_mass, 'tail_mass': stats.tail_mass, 'top_logp': top_logp, 'gap': gap}
  return {name: constrain(x_BT, None, None) for name, x_BT in out.items()}


# On the host: figures


def figures(values: Mapping[str, np.ndarray], bytes_N: np.ndarray, vocab_size: int) -> dict[str, Any]:
  """Computes the metrics of one domain (source of the data) in float64. Returns {metric: value}.

  The name of a metric ends with its unit, if it has one, such as 'ce_nats'. A few values are dicts: quantiles,
  histograms, the calibration curve and the coverage.

  coverage[n] is the fraction of tokens with p(target) <= 1/n. For such a token, n samples are expected to contain the
  target at most once. coverage[n] is an upper bound for the coverage profile of arXiv 2510.15020, applied to tokens.
  That is the fraction of tokens with q / p(target) >= n, where q <= 1 is the target's true probability.

  Args:
    values: {name: array [N]}, from `token_values`.
    bytes_N: the number of bytes of each target token.
    vocab_size: the number of tokens in the vocabulary.
  """
  v = {name: np.asarray(x, np.float64) for name, x in values.items()}
  surprise, entropy, right = -v['logp'], v['entropy'], v['rank'] == 0
  uncertain = np.sort(entropy)[-max(1, round(HIGH_ENTROPY_SHARE * entropy.size)):]
  calibration = _calibration(np.exp(v['top_logp']), right)
  distance = [abs(a - c) * n for a, c, n in zip(*(calibration[k] for k in ('accuracy', 'confidence', 'counts'))) if n]
  rank_edges = [0, *(2**i for i in range(math.ceil(math.log2(max(vocab_size, 2))) + 1))]
  return {
    'tokens': entropy.size,
    'ce_nats': surprise.mean(),
    'bits_per_byte': surprise.sum() / max(int(bytes_N.sum(dtype=np.int64)), 1) / math.log(2),
    'perplexity': math.exp(min(surprise.mean(), 700.0)),
    'entropy_nats': entropy.mean(),
    'entropy_top20_nats': uncertain.mean(),
    'rank1_accuracy': right.mean(),
    'head_mass': v['head_mass'].mean(),
    'tail_mass': v['tail_mass'].mean(),
    'top_gap_nats': v['gap'].mean(),
    'ece': sum(distance) / entropy.size,
    'entropy_quantiles': {str(q): float(np.quantile(entropy, q)) for q in QUANTILES},
    'coverage': {str(n): (surprise >= math.log(n)).mean() for n in COVERAGE_N if n <= 2 * vocab_size},
    'rank_histogram': _histogram(v['rank'], rank_edges),
    'entropy_histogram': _histogram(
      np.clip(entropy, 0, math.log(vocab_size)), np.linspace(0, math.log(vocab_size), ENTROPY_BINS + 1).tolist()),
    'calibration': calibration,
  }


def _histogram(values_N: np.ndarray, edges: list[float]) -> dict[str, list]:
  """Returns {'edges': ..., 'counts': ...}. Bin i counts values in [edges[i], edges[i + 1]); the last bin includes its
  upper edge.
  """
  return {'edges': edges, 'counts': np.histogram(values_N, edges)[0].tolist()}


def _calibration(confidence_N: np.ndarray, right_N: np.ndarray) -> dict[str, list]:
  """Returns the calibration curve: how often the model's most probable token is right, depending on its probability.

  Tokens are divided into bins by the probability of the most probable token. The result has the `edges` of the bins
  and, for each bin, three values. `counts` is the number of tokens. `confidence` is the mean probability of the most
  probable token. `accuracy` is the fraction of tokens for which the most probable token is the target. The last two are
  None for an empty bin.

  confidence_N: the probability of the most probable token.
  right_N: bool, True where the most probable token is the target.
  """
  edges_E = np.linspace(0, 1, CONFIDENCE_BINS + 1)
  bin_N = np.clip(np.digitize(confidence_N, edges_E) - 1, 0, CONFIDENCE_BINS - 1)
  counts_E = np.bincount(bin_N, minlength=CONFIDENCE_BINS)
  mean = lambda x_N: [float(s / n) if n else None for s, n in zip(np.bincount(bin_N, x_N, CONFIDENCE_BINS), counts_E)]
  return {'edges': edges_E.tolist(), 'confidence': mean(confidence_N), 'accuracy': mean(right_N),
          'counts': counts_E.tolist()}


def describe(subject: CheckpointRef, name: str, f: Mapping[str, Any]) -> str:
  """Returns one line of text with a checkpoint's main metrics on one domain.

  The line is fitted to the width of the terminal by leaving out the last metrics.

  name: the name of the domain.
  f: the metrics of the domain, from `figures`.
  """
  return fitted(f'step {subject.step}  {name}: ce {f["ce_nats"]:.4f} nats', [
    f'entropy {f["entropy_nats"]:.4f} (top 20% {f["entropy_top20_nats"]:.3f})', f'{f["bits_per_byte"]:.4f} bits/byte',
    f'tail mass {f["tail_mass"]:.4f}', f'ece {f["ece"]:.4f}', f'top gap {f["top_gap_nats"]:.3f}',
    f'{f["tokens"]:,} tokens'], columns())
