"""Tests export to and import from Hugging Face's format: equal logits there, equal bits after a round trip.

Whatever can't be converted gives one line of error.
"""

import dataclasses
import filecmp
import importlib.util
import json
import pathlib
import resource
import shutil
import subprocess
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from betarank import model
from betarank.configs import common, errors, load
from betarank.configs.sections import section
from betarank.data import read_tokenizer, tokenizer_training
from betarank.data import tokenizer as spm
from betarank.model import hf_config, hf_tokenizer, hf_weights
from betarank.model.config import MoeConfig
from betarank.model.hf_config import HfError
from betarank.runtime import checkpoint
from betarank.runtime.state import TrainState
from betarank.train import hf, setup
from tests import tokenizer_files
from tests.bucket import Bucket
from tests.runs import BETARANK, environment

DENSE = model.ModelConfig(
  vocab_size=300, layers=2, d_model=32, d_ff=48, heads=4, kv_heads=2, head_dim=16, rope_base=1e4, norm_eps=1e-6,
  tied_embeddings=True, compute_dtype='float32', remat_policy='none', scan_layers=True)
QWEN2, LLAMA = (dataclasses.replace(DENSE, qk_norm=False, qkv_bias=bias) for bias in (True, False))
EXPERTS = MoeConfig(experts=6, experts_per_token=2, expert_d_ff=24)
MODELS = {
  'dense tied': DENSE,
  'dense': dataclasses.replace(DENSE, tied_embeddings=False, layers=11, rope_base=1e6, norm_eps=1e-5),
  'llama': dataclasses.replace(LLAMA, tied_embeddings=False, rope_base=5e5, rope_factor=8.0, norm_eps=1e-5),
  'softmax': dataclasses.replace(DENSE, moe=dataclasses.replace(EXPERTS, router='softmax', norm_topk_prob=False)),
  'sigmoid': dataclasses.replace(DENSE, moe=EXPERTS),
  'sigmoid, shared': dataclasses.replace(
    DENSE, tied_embeddings=False, moe=dataclasses.replace(EXPERTS, shared_d_ff=48, routed_scale=2.5)),
}
TEXT = ['def f(x):\n  return  x\n', 'The sum of 12 and 345 is 357.\n\n', '  = = ==== ----\t日本語 é']


def random_params(c):
  """Returns random parameters. Norms and router biases are random too, although training starts them as constants."""
  random = np.random.default_rng(0)
  scale = lambda path: 1.0 if 'norm' in path[-1].key else 0.2
  return jax.tree_util.tree_map_with_path(
    lambda path, x: random.normal(size=x.shape, scale=scale(path)).astype(np.float32), model.abstract(c)[1])


def save(c, params, path, tokenizer='', lineage=None):
  """Saves a checkpoint as training on eight devices saves it: in chunks. Returns its path."""
  config = common.base()
  config.model.update({k: v for k, v in dataclasses.asdict(c).items() if k != 'moe'})
  config.model.moe = dataclasses.asdict(c.moe)
  config.data.tokenizer = tokenizer
  keep = checkpoint.Checkpoints(path, checkpoint.CheckpointConfig(1, 1, 0))
  meta = {'config': json.loads(load.to_json(config)), 'cursor': None, 'parent': '', 'code_version': ''}
  mesh = model.make_mesh(model.MeshConfig(data=1, fsdp=2, expert=2, context=1, tensor=2))
  params = jax.device_put(params, model.shardings(mesh, model.abstract(c)[2]))
  keep.save(TrainState(jnp.zeros((), jnp.int32), params, ()), meta | (lineage or {}), 3)
  keep.wait()
  keep.close()
  return str(path)


@pytest.fixture(scope='module')
def tokenizer_file(tmp_path_factory):
  path = str(tmp_path_factory.mktemp('tokenizer') / 't.model')
  tokenizer_training.train(TEXT * 50, 300, path)
  return path


@pytest.fixture(scope='module', params=MODELS)
def exported(request, tmp_path_factory, tokenizer_file):
  """Returns (config, parameters, folder) of an exported random model. The largest allowed file is so small that there
  are several files.
  """
  c, root = MODELS[request.param], tmp_path_factory.mktemp('exported')
  params = random_params(c)
  hf.export(save(c, params, root / 'run', tokenizer_file), str(root / 'hf'), shard_gb=5e-5)
  return c, params, root / 'hf'


def test_transformers_computes_the_same(exported):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  c, params, folder = exported
  theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager', output_loading_info=True)
  assert not any(info[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys', 'error_msgs'))
  tokens_BT = np.random.default_rng(0).integers(0, c.vocab_size, (2, 40))
  positions_BT = np.broadcast_to(np.arange(40), (2, 40))
  hidden_BTD, _ = model.forward(c, params, *map(jnp.asarray, (tokens_BT, positions_BT, np.ones_like(tokens_BT))))
  ours_BTV = hidden_BTD @ model.head(c, params)
  with torch.no_grad():
    theirs_BTV = theirs(torch.tensor(tokens_BT)).logits.numpy()
  np.testing.assert_allclose(ours_BTV, theirs_BTV, rtol=0, atol=1e-4)
  assert np.std(theirs_BTV) > 0.5  # the bound is small against what it bounds
  assert theirs.generation_config.eos_token_id == spm.EOS


def test_round_trip_is_bit_exact(exported, tmp_path):
  c, params, folder = exported
  said = hf.import_(str(folder), str(tmp_path / 'back'))
  again, meta = checkpoint.restore_weights(checkpoint.find(str(tmp_path / 'back')), model.abstract(c)[1])
  assert (tmp_path / 'back' / 'checkpoints' / '0' / 'manifest.json').exists()  # against which it was checked
  jax.tree.map(np.testing.assert_array_equal, again, params)
  got = section(model.ModelConfig, meta['config']['model'], 'model')
  fixed = {name: getattr(c, name) for name in ('compute_dtype', 'remat_policy', 'scan_layers', 'attention')}
  moe = dataclasses.replace(got.moe, bias_update_rate=c.moe.bias_update_rate, kernel=c.moe.kernel)
  assert dataclasses.replace(got, moe=moe, **fixed) == c
  assert f'betarank train --config={tmp_path}/back/config.json' in said
  resolved = load.load(f'{tmp_path}/back/config.json')
  assert section(model.ModelConfig, resolved.model, 'model') == got
  assert resolved.train.init_from == str(tmp_path / 'back')
  assert resolved.data.tokenizer == meta['config']['data']['tokenizer'] == f'{tmp_path}/back/tokenizer/tokenizer.model'


def test_a_tokenizer_of_ours_keeps_its_identity(exported, tokenizer_file, tmp_path):
  hf.import_(str(exported[2]), str(tmp_path / 'back'))
  assert spm.sha256_of(str(tmp_path / 'back' / 'tokenizer' / 'tokenizer.model')) == spm.sha256_of(tokenizer_file)
  hf.export(str(tmp_path / 'back'), str(tmp_path / 'again'))
  for name in ('tokenizer.json', 'tokenizer_config.json', 'tokenizer.model', 'generation_config.json', 'config.json'):
    assert (tmp_path / 'again' / name).read_bytes() == (exported[2] / name).read_bytes()


def test_a_checkpoint_of_rl_has_the_tokenizer_of_its_start(tokenizer_file, tmp_path):
  rl = common.rl_base()
  rl.model = load.load('configs/smoke.py').model
  rl.model.update({k: v for k, v in dataclasses.asdict(DENSE).items() if k != 'moe'})
  start = common.base()
  lineage = {'config': json.loads(load.to_json(rl)), 'tokenizer': tokenizer_file,
             'inherited': {'data': json.loads(load.to_json(start))['data']}}
  run = save(DENSE, random_params(DENSE), tmp_path / 'run', lineage=lineage)
  hf.export(run, str(tmp_path / 'hf'))
  assert (tmp_path / 'hf' / 'tokenizer.json').exists()
  longest = max(start.data.sequence_length, rl.rl.max_prompt_tokens + max(rl.rl.max_new_tokens))
  assert json.loads((tmp_path / 'hf' / 'config.json').read_text())['max_position_embeddings'] == longest


def test_files(exported):
  """Files have a limited size, and safetensors can read them. Each has whole tensors, in the order of the layers."""
  pytest.importorskip('safetensors')
  c, _, folder = exported
  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  files = hf_weights.Files(folder)
  assert {name: place[0].name for name, place in files.found.items()} == index['weight_map']
  largest = max(path.stat().st_size for path in folder.glob('*.safetensors'))
  assert largest < 5e4 + 2e4  # headers
  assert sum(np.prod(shape) * 4 for _, _, shape in files.found.values()) == index['metadata']['total_size']
  config = json.loads((folder / 'config.json').read_text())
  assert config['max_position_embeddings'] == 512 and config['eos_token_id'] == spm.EOS
  assert config['rope_theta'] == config['rope_parameters']['rope_theta'] == c.rope_base


def test_a_checkpoint_in_a_bucket(tmp_path):
  save(DENSE, random_params(DENSE), tmp_path / 'store/bucket/run')
  hf.export(str(tmp_path / 'store/bucket/run'), str(tmp_path / 'local'), tokenizer_path='none')
  (tmp_path / 'store/bucket/run/checkpoints/3' / checkpoint.COMMITTED).touch()
  with Bucket(tmp_path / 'store'):
    hf.export('gs://bucket/run', str(tmp_path / 'hf'), tokenizer_path='none')
  for path in (tmp_path / 'local').iterdir():
    assert (tmp_path / 'hf' / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize('c', [MODELS['sigmoid'], QWEN2], ids=['sigmoid', 'qwen2'])
def test_bfloat16(c, tmp_path):
  params = random_params(c)
  hf.export(save(c, params, tmp_path / 'run'), str(tmp_path / 'hf'), dtype='bfloat16', tokenizer_path='none')
  assert (tmp_path / 'hf' / 'model.safetensors').exists()
  hf.import_(str(tmp_path / 'hf'), str(tmp_path / 'back'))
  again, _ = checkpoint.restore_weights(checkpoint.find(str(tmp_path / 'back')), model.abstract(c)[1])
  rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
  if c.moe.experts:
    bias = params['layers']['feed_forward']['router_bias_E']
    rounded['layers']['feed_forward']['router_bias_E'] = bias  # what balances is kept as it is
  jax.tree.map(np.testing.assert_array_equal, again, rounded)


@pytest.mark.parametrize('kind', ['Qwen3', 'Qwen3Moe', 'Qwen2', 'Llama'])
def test_import_of_what_transformers_writes(kind, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
               head_dim=8, intermediate_size=48, tie_word_embeddings=kind == 'Qwen3', rope_theta=1e6)
  if kind == 'Qwen3Moe':
    sizes |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)  # norm_topk_prob is False by default
  if kind == 'Llama':  # the rope scaling of Llama 3.2
    sizes |= dict(rope_scaling=dict(rope_type='llama3', factor=32.0, **hf_config.LLAMA3_ROPE),
                  max_position_embeddings=131_072)
  torch.manual_seed(0)
  theirs = getattr(transformers, f'{kind}ForCausalLM')(getattr(transformers, f'{kind}Config')(**sizes))
  for name, x in theirs.named_parameters():
    if name.endswith('bias'):  # transformers starts them at zero
      torch.nn.init.normal_(x)
  theirs.to(torch.bfloat16).save_pretrained(tmp_path / 'hf', max_shard_size='10KB')
  hf.import_(str(tmp_path / 'hf'), str(tmp_path / 'ours'))
  source = checkpoint.find(str(tmp_path / 'ours'))
  c = section(model.ModelConfig, checkpoint.read_meta(source)['config']['model'], 'model')
  c = dataclasses.replace(c, compute_dtype='float32')
  params, _ = checkpoint.restore_weights(source, model.abstract(c)[1])
  tokens_BT = np.arange(20)[None] * 3 % 64
  hidden_BTD, _ = model.forward(c, params, *map(jnp.asarray, (tokens_BT, np.arange(20)[None], tokens_BT * 0 + 1)))
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf', dtype=torch.float32)
  with torch.no_grad():
    theirs_BTV = theirs(torch.tensor(tokens_BT)).logits.numpy()
  assert (c.rope_base, c.rope_factor) == (1e6, 32.0 if kind == 'Llama' else 1.0)
  np.testing.assert_allclose(hidden_BTD @ model.head(c, params), theirs_BTV, rtol=0, atol=1e-4)


# What can't be imported. Each case changes a good directory; Tensors is {name: array}.


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  root = tmp_path_factory.mktemp('good')
  hf.export(save(DENSE, random_params(DENSE), root / 'run'), str(root / 'hf'), tokenizer_path='none')
  return root / 'hf'


def edit_config(**values):
  def edit(folder):
    path = folder / 'config.json'
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | values).items() if v != 'absent'}))
  return edit


def edit_tensors(change):
  def edit(folder):
    numpy = pytest.importorskip('safetensors.numpy')
    tensors = numpy.load_file(folder / 'model.safetensors')
    change(tensors)
    numpy.save_file(tensors, folder / 'model.safetensors')
  return edit


def header(content, length=None, data=bytes(12)):
  text = content if isinstance(content, bytes) else json.dumps(content).encode()
  head = (len(text) if length is None else length).to_bytes(8, 'little')
  return lambda folder: (folder / 'model.safetensors').write_bytes(head + text + data)


def index(content):
  def edit(folder):
    (folder / 'model.safetensors').rename(folder / 'model-00001-of-00002.safetensors')
    (folder / 'model.safetensors.index.json').write_text(content)
  return edit


f32 = lambda shape, *offsets: {'dtype': 'F32', 'shape': shape, 'data_offsets': offsets}
Q = 'model.layers.1.self_attn.q_proj.weight'
BAD = [
  (edit_tensors(lambda t: t.pop(Q)), rf'no tensor {Q}, which its config.json asks for'),
  (edit_tensors(lambda t: t.update({'x.bias': t[Q], 'y': t[Q]})), r'holds x\.bias and 1 more tensors, which a model'),
  (edit_tensors(lambda t: t.update({Q: t[Q][:8]})), rf'{Q} is \[8, 32\], but config.json makes it \[64, 32\]'),
  (edit_tensors(lambda t: t.update({Q: t[Q].astype(np.int8)})), rf'{Q} is I8; only F32, BF16, F16'),
  (edit_tensors(lambda t: t.update({'lm_head.weight': t['model.embed_tokens.weight'] + 1})),
   r'lm_head.weight differs from the embedding; config.json must have tie_word_embeddings=false'),
  (edit_config(num_hidden_layers=3), r'no tensor model\.layers\.2\.'),
  (edit_config(num_hidden_layers=2**31 - 1), r'no tensor model\.layers\.2\.'),
  (edit_config(hidden_size=2**31 - 1, vocab_size=2**31 - 1, intermediate_size=2**31 - 1), r'is \[.*but config.json'),
  (edit_config(num_hidden_layers=2**40), r'num_hidden_layers is 1099511627776; it must be a whole number > 0'),
  (edit_config(hidden_size='32'), r"hidden_size is '32'; it must be a whole number"),
  (edit_config(rms_norm_eps='absent'), r'rms_norm_eps is missing; it must be a number > 0'),
  (edit_config(num_key_value_heads=3), r'kv_heads must divide heads = 4, got 3'),
  (edit_config(architectures=['MistralForCausalLM']), r"architectures is \['Mistral.*'\]; only Qwen3ForCausalLM"),
  (edit_config(architectures=[['Qwen3ForCausalLM']]), r"architectures is .*; only Qwen3ForCausalLM"),
  (edit_config(layer_types=7), r'layer_types is 7; only'),
  (edit_config(rope_scaling='yarn'), r"rope_scaling is 'yarn'; it must be a JSON object or null"),
  (edit_config(rope_scaling={'type': 'yarn', 'factor': 4.0}, rope_parameters='absent'), r"rope_type is 'yarn'; only"),
  (edit_config(rope_parameters={'rope_type': 'linear', 'rope_theta': 1e4}), r"rope_type is 'linear'; only"),
  (edit_config(rope_scaling={'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
                             'original_max_position_embeddings': 4096}, rope_parameters=None),
   r'original_max_position_embeddings is 4096; only 8192, or no rope scaling, can be imported'),
  (edit_config(rope_scaling={'rope_type': 'llama3', **hf_config.LLAMA3_ROPE}, rope_parameters=None),
   r'factor is missing; it must be a number > 0'),
  (edit_config(architectures=['LlamaForCausalLM'], mlp_bias=True), r'mlp_bias is True; only LlamaForCausalLM with'),
  (edit_config(architectures=['LlamaForCausalLM']), r'holds .*k_norm.* which a model of its config.json does not have'),
  (edit_config(architectures=['Qwen2ForCausalLM']), r'no tensor .*_proj\.bias, which its config.json asks for'),
  (edit_config(attention_bias=True), r'attention_bias is True; only Qwen3ForCausalLM with False'),
  (edit_config(hidden_act='gelu'), r"hidden_act is 'gelu'; only Qwen3ForCausalLM with 'silu'"),
  (edit_config(quantization_config={'bits': 4}), r"quantization_config is {'bits': 4}; only"),
  (edit_config(layer_types=['full_attention', 'sliding_attention']), r"layer_types is .*'sliding_attention'\]; only"),
  (edit_config(architectures=['Qwen3MoeForCausalLM'], decoder_sparse_step=2), r'decoder_sparse_step is 2; only'),
  (edit_config(architectures=['Qwen3MoeForCausalLM'], moe_intermediate_size=8, num_experts_per_tok=2, num_experts=4,
               norm_topk_prob='no'), r"norm_topk_prob is 'no'; it must be true or false"),
  (lambda folder: (folder / 'config.json').write_text('['), r'config.json: not JSON'),
  (lambda folder: (folder / 'config.json').write_text('[' * 100_000), r'config.json: not JSON'),
  (lambda folder: (folder / 'config.json').write_text('[]'), r'config.json: not a JSON object'),
  (lambda folder: (folder / 'config.json').unlink(), r'config.json: no such file; give a directory'),
  (lambda folder: (folder / 'model.safetensors').unlink(), r'has no model.safetensors and no'),
  (header(b'not json'), r'not a whole safetensors file'),
  (header({}, length=2**63), r'not a whole safetensors file'),
  (header({}, length=2**20), r'not a whole safetensors file'),
  (header({Q: f32([2**40, 2**40], 0, 12)}), r'not a whole safetensors file'),
  (header({Q: f32([3], 0, 12), 'y': f32([2], 4, 12)}), r'not a whole safetensors file'),
  (header({Q: f32([4], 0, 16)}), r'not a whole safetensors file'),
  (lambda folder: (folder / 'model.safetensors').write_bytes(b''), r'not a whole safetensors file'),
  (index('{"weight_map": {"a": "../../model.safetensors"}}'), r"weight_map names '\.\./\.\./model\.safetensors'; only"),
  (index('{"weight_map": {"a": ["b"]}}'), r'weight_map'),
  (index('{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'),
   r'weight_map names model-00002-of-00002.safetensors, which is not there; fetch all'),
  (index('{}'), r'has no weight_map'),
]


@pytest.mark.parametrize('edit, message', BAD, ids=[message[:50] for _, message in BAD])
def test_what_cannot_be_imported(edit, message, good, tmp_path):
  pytest.importorskip('safetensors')
  folder = shutil.copytree(good, tmp_path / 'hf')
  edit(folder)
  with pytest.raises(ValueError, match=message) as caught:
    hf.import_(str(folder), str(tmp_path / 'out'))
  assert isinstance(caught.value, HfError | errors.ConfigError) and '\n' not in str(caught.value)
  assert [p.name for p in tmp_path.iterdir()] == ['hf']  # nothing half-made stays


def test_a_head_equal_to_the_embedding_is_taken(good, tmp_path):
  """Qwen3-0.6B, for example, has such a head."""
  folder = shutil.copytree(good, tmp_path / 'hf')
  edit_tensors(lambda t: t.update({'lm_head.weight': t['model.embed_tokens.weight']}))(folder)
  hf.import_(str(folder), str(tmp_path / 'out'))


def test_a_zero_shared_expert_must_be_zero(tmp_path):
  numpy = pytest.importorskip('safetensors.numpy')
  c, folder = MODELS['sigmoid'], tmp_path / 'hf'
  hf.export(save(c, random_params(c), tmp_path / 'run'), str(folder), tokenizer_path='none')
  tensors = numpy.load_file(folder / 'model.safetensors')
  name = 'model.layers.1.mlp.shared_experts.up_proj.weight'
  tensors[name] = tensors[name] + 1
  numpy.save_file(tensors, folder / 'model.safetensors')
  with pytest.raises(HfError, match=rf'{name} is not zero as config.json says'):
    hf.import_(str(folder), str(tmp_path / 'out'))


def test_published_configs_of_qwen2_and_llama3():
  """They have no head_dim, and Llama 3.0 has no rope scaling. Values of Qwen2.5-0.5B and of Llama 3 8B."""
  common = dict(hidden_act='silu', rms_norm_eps=1e-5, rope_scaling=None)
  got = hf_config.from_hf(common | dict(
    architectures=['Qwen2ForCausalLM'], hidden_size=896, intermediate_size=4864, num_attention_heads=14,
    num_hidden_layers=24, num_key_value_heads=2, rope_theta=1e6, tie_word_embeddings=True, use_sliding_window=False,
    sliding_window=32_768, max_window_layers=24, vocab_size=151_936), 'config.json')
  assert (got['head_dim'], got['qk_norm'], got['qkv_bias'], got['rope_factor']) == (64, False, True, 1.0)
  got = hf_config.from_hf(common | dict(
    architectures=['LlamaForCausalLM'], attention_bias=False, hidden_size=4096, intermediate_size=14_336,
    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, pretraining_tp=1, rope_theta=5e5,
    tie_word_embeddings=False, vocab_size=128_256), 'config.json')
  assert (got['head_dim'], got['qk_norm'], got['qkv_bias'], got['tied_embeddings']) == (128, False, False, False)


@pytest.mark.parametrize('changes', [dict(qkv_bias=True), dict(qk_norm=False, moe=EXPERTS)])
def test_blocks_that_no_architecture_has(changes):
  with pytest.raises(HfError, match=r'^model\.qk_norm = .* and model\.qkv_bias = .*: no architecture of .* has this$'):
    hf_config.to_hf(dataclasses.replace(DENSE, **changes), positions=8, dtype='float32')


@pytest.mark.parametrize('moe, message', [
  (dict(router='softmax', shared_d_ff=24), r'model\.moe\.shared_d_ff = 24: Qwen3MoeForCausalLM has none'),
  (dict(router='softmax', routed_scale=2.0), r'model\.moe\.routed_scale = 2\.0: Qwen3MoeForCausalLM has none'),
  (dict(experts=1, experts_per_token=1), r'model\.moe\.experts = 1: Glm4MoeForCausalLM needs two or more'),
  (dict(shared_d_ff=32), r'shared_d_ff = 32: Glm4MoeForCausalLM needs a multiple of expert_d_ff = 24'),
])
def test_what_cannot_be_exported(moe, message):
  with pytest.raises(HfError, match=message):
    hf_config.to_hf(dataclasses.replace(DENSE, moe=dataclasses.replace(EXPERTS, **moe)), positions=8, dtype='float32')


def test_export_needs_room_and_a_fitting_tokenizer(good, tmp_path, tokenizer_file):
  run = save(DENSE, random_params(DENSE), tmp_path / 'run', str(tmp_path / 'none.model'))
  with pytest.raises(HfError, match=r'exists and is not empty; give a new directory'):
    hf.export(run, str(good), tokenizer_path='none')
  with pytest.raises(HfError, match=r'none\.model: no such tokenizer; give --tokenizer=PATH, or none'):
    hf.export(run, str(tmp_path / 'out'))
  smaller = dataclasses.replace(DENSE, vocab_size=298)
  other = save(smaller, random_params(smaller), tmp_path / 'other', tokenizer_file)
  with pytest.raises(HfError, match=r'has 300 tokens, but the model 298; give the one'):
    hf.export(other, str(tmp_path / 'out'))
  qwen2 = save(QWEN2, random_params(QWEN2), tmp_path / 'qwen2', tokenizer_file)
  with pytest.raises(HfError, match=r'transformers would read it with the rules of Qwen2.*; use --tokenizer=none'):
    hf.export(qwen2, str(tmp_path / 'out'))
  with pytest.raises(checkpoint.CheckpointError, match='no such folder'):
    hf.export(str(tmp_path / 'nowhere'), str(tmp_path / 'out'))
  assert not (tmp_path / 'out').exists()


def test_a_full_disk_is_one_line(tmp_path):
  run = save(DENSE, random_params(DENSE), tmp_path / 'run')
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    with pytest.raises(HfError, match=r'out: could not be written \(File too large\)'):
      hf.export(run, str(tmp_path / 'out'), tokenizer_path='none')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert [p.name for p in tmp_path.iterdir()] == ['run']


def test_a_damaged_checkpoint_is_one_line(tmp_path):
  run = save(DENSE, random_params(DENSE), tmp_path / 'run')
  for path in (tmp_path / 'run').glob('checkpoints/3/state/**/d/*'):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xff
    path.write_bytes(data)
  with pytest.raises(checkpoint.CheckpointError, match=r'checkpoints/3/state/\S+: not what was written'):
    hf.export(run, str(tmp_path / 'out'), tokenizer_path='none')
  (tmp_path / 'run' / 'checkpoints' / '3' / 'manifest.json').unlink()  # as older ones are
  with pytest.raises(HfError, match=r'checkpoints/3: params\.\S+ could not be read \(.*\); export another checkpoint$'):
    hf.export(run, str(tmp_path / 'out'), tokenizer_path='none')
  assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
  """2 GB of weights are imported and exported. Meanwhile, the process grows by less than 1.2 GB, without mapped files.
  """
  c = dataclasses.replace(
    DENSE, vocab_size=50_000, layers=12, d_model=1024, heads=16, kv_heads=4, head_dim=64, tied_embeddings=False,
    moe=MoeConfig(experts=32, experts_per_token=4, expert_d_ff=320, router='softmax'))
  random = np.random.default_rng(0)
  (tmp_path / 'hf').mkdir()
  tensors = [(name, 'F32', leaf.their_shape) for leaf in hf_weights.leaves(c) for name, _ in leaf.tensors()]
  for view in hf_weights.create(tmp_path / 'hf', tensors, 10**9).values():
    view[...] = random.standard_normal(view.shape, np.float32)
  (tmp_path / 'hf' / 'config.json').write_text(json.dumps(hf_config.to_hf(c, positions=512, dtype='float32')))
  anonymous = lambda: int(pathlib.Path('/proc/self/status').read_text().split('RssAnon:')[1].split()[0]) * 1024
  for name, work in {'import': lambda: hf.import_(str(tmp_path / 'hf'), str(tmp_path / 'ours')),
                     'export': lambda: hf.export(str(tmp_path / 'ours'), str(tmp_path / 'out'), shard_gb=1.0,
                                                 tokenizer_path='none')}.items():
    before, done = anonymous(), threading.Thread(target=work)
    done.start()
    peak = before
    while done.is_alive():
      peak = max(peak, anonymous())
      done.join(0.02)
    print(f'{name}: {(peak - before) / 1e9:.2f} GB for {sum(model.parameter_counts(c).values()) * 4e-9:.2f} GB')
    assert peak - before < 1.2e9
  for path in (tmp_path / 'hf').glob('*.safetensors'):
    assert filecmp.cmp(path, tmp_path / 'out' / path.name, shallow=False)
  shutil.rmtree(tmp_path)  # pytest would keep 6 GB


def test_command_line(good, tmp_path, capsys):
  run = lambda *args: errors.run_main(lambda: hf.main(args))
  run('import', f'--from={good}', f'--to={tmp_path / "ours"}')
  said = capsys.readouterr().out
  assert f'--config={tmp_path / "ours"}/config.json' in said and 'no tokenizer' in said
  run('export', f'--checkpoint={tmp_path / "ours"}', f'--to={tmp_path / "hf"}', '--tokenizer=none')
  for path in good.iterdir():
    assert (tmp_path / 'hf' / path.name).read_bytes() == path.read_bytes()
  with pytest.raises(SystemExit):
    run('import', f'--from={tmp_path}', f'--to={tmp_path / "again"}')
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1


def test_tokenizer_gives_the_same_ids(exported, tokenizer_file):
  transformers = pytest.importorskip('transformers')
  theirs, ours = transformers.AutoTokenizer.from_pretrained(exported[2]), read_tokenizer(tokenizer_file)
  random = np.random.default_rng(0)
  alphabets = [' \n\t▁ab01<>/s\r\0', '= -#', 'éßø日本語😀a ', 'the sum of 12 ', ''.join(TEXT)]
  texts = [*TEXT, '', ' ', '\n', '  two  spaces \n\n▁ literal mark▁▁ ', '</s><s><pad><unk><0x41>',
           '\ufeff \u2028 \U0010ffff']
  texts += [''.join(random.choice(list(alphabets[i % 5]), random.integers(0, 40))) for i in range(500)]
  for text in texts:
    ids = ours.encode(text).tolist()
    assert theirs(text, add_special_tokens=False).input_ids == ids, text
    assert theirs(text).input_ids == [spm.BOS, *ids]
    assert theirs.decode(ids) == text
  assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (spm.BOS, spm.EOS, spm.PAD)
  assert theirs.decode([spm.BOS, *ours.encode('sum'), spm.EOS], skip_special_tokens=True) == 'sum'


# A tokenizer.json that comes with the weights.


LARGER = dataclasses.replace(DENSE, vocab_size=416)  # than the tokenizer, as Qwen3's is


@pytest.fixture(scope='module')
def qwen(tmp_path_factory):
  """Returns a folder like those of Qwen: weights in bfloat16, tokenizer.json, and the files that transformers writes
  with it.
  """
  root = tmp_path_factory.mktemp('qwen')
  run = save(LARGER, random_params(LARGER), root / 'run')
  hf.export(run, str(root / 'hf'), dtype='bfloat16', tokenizer_path='none')
  tokenizer_files.byte_level(root / 'hf', 'qwen')
  (root / 'hf' / 'merges.txt').write_text('#version: 0.2\n')
  (root / 'hf' / 'chat_template.jinja').write_text("{{ cycler.__init__.__globals__.os.abort() }}")
  edit_config(max_position_embeddings=40_960)(root / 'hf')
  return root / 'hf'


TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'merges.txt',
                   'chat_template.jinja')


def test_weights_and_tokenizer_come_back_as_they_were(qwen, tmp_path):
  hf.import_(str(qwen), str(tmp_path / 'ours'))
  config = checkpoint.read_meta(checkpoint.find(str(tmp_path / 'ours')))['config']
  read = read_tokenizer(config['data']['tokenizer'], config['model']['vocab_size'])
  assert (read.vocab_size, config['model']['vocab_size'], config['data']['vocab_size']) == (400, 416, 416)
  assert read.sha256 == spm.sha256_of(str(qwen))
  hf.export(str(tmp_path / 'ours'), str(tmp_path / 'again'), dtype='bfloat16')
  assert sorted(p.name for p in qwen.iterdir()) == sorted(p.name for p in (tmp_path / 'again').iterdir())
  for name in (*TOKENIZER_FILES, 'model.safetensors'):
    assert (tmp_path / 'again' / name).read_bytes() == (qwen / name).read_bytes(), name
  before, after = (json.loads((folder / 'config.json').read_text()) for folder in (qwen, tmp_path / 'again'))
  assert after == before | {'bos_token_id': read.bos, 'eos_token_id': read.eos, 'pad_token_id': read.pad}
  hf.export(str(tmp_path / 'ours'), str(tmp_path / 'short'), positions=8192, tokenizer_path='none')
  assert json.loads((tmp_path / 'short' / 'config.json').read_text())['max_position_embeddings'] == 8192


def test_weights_that_are_imported_are_used_with_their_tokenizer_only(qwen, tokenizer_file, tmp_path):
  hf.import_(str(qwen), str(tmp_path / 'ours'))
  meta = checkpoint.read_meta(checkpoint.find(str(tmp_path / 'ours')))
  assert setup.read_tokenizer(meta['config']['data']['tokenizer'], LARGER, meta).sha256 == spm.sha256_of(str(qwen))
  with pytest.raises(errors.ConfigError, match='is not the tokenizer that the checkpoint was trained with'):
    setup.read_tokenizer(tokenizer_file, LARGER, meta)


def test_a_tokenizer_can_be_replaced_or_left_out(qwen, tokenizer_file, tmp_path):
  hf.import_(str(qwen), str(tmp_path / 'other'), tokenizer_file)
  path = load.load(f'{tmp_path}/other/config.json').data.tokenizer
  assert spm.sha256_of(path) == spm.sha256_of(tokenizer_file) and path.startswith(f'{tmp_path}/other/tokenizer/')
  assert 'no tokenizer' in hf.import_(str(qwen), str(tmp_path / 'none'), 'none')
  assert 'tokenizer_sha256' not in checkpoint.read_meta(checkpoint.find(str(tmp_path / 'none')))
  assert not (tmp_path / 'none' / 'tokenizer').exists()


def test_a_model_smaller_than_its_tokenizer_and_a_broken_tokenizer_are_one_line(qwen, tmp_path):
  folder = shutil.copytree(qwen, tmp_path / 'hf')
  (folder / 'tokenizer.json').write_text('{')
  with pytest.raises(HfError, match=r'tokenizer\.json: not JSON .*\(or leave it out with --tokenizer=none\)'):
    hf.import_(str(folder), str(tmp_path / 'out'))
  small = tmp_path / 'small'
  hf.export(save(DENSE, random_params(DENSE), tmp_path / 'run'), str(small), tokenizer_path='none')
  tokenizer_files.byte_level(small, 'qwen')
  with pytest.raises(HfError, match=r'small: has 400 tokens, but config\.model\.vocab_size is 300'):
    hf.import_(str(small), str(tmp_path / 'out'))
  assert not (tmp_path / 'out').exists()


def test_only_files_of_the_model_are_copied(qwen, tmp_path):
  """A link to another file could otherwise publish that file. Links within Hugging Face's own cache are allowed."""
  (tmp_path / 'secret').write_text('{"password": 1}')
  folder = shutil.copytree(qwen, tmp_path / 'hf')
  (folder / 'merges.txt').unlink()
  (folder / 'merges.txt').symlink_to(tmp_path / 'secret')
  with pytest.raises(HfError, match=r'merges\.txt: is a link to .*secret, outside of the model'):
    hf.import_(str(folder), str(tmp_path / 'out'))
  cached = tmp_path / 'cache' / 'snapshots' / '1f2e'
  shutil.copytree(qwen, tmp_path / 'cache' / 'blobs')
  cached.mkdir(parents=True)
  for path in (tmp_path / 'cache' / 'blobs').iterdir():
    (cached / path.name).symlink_to(f'../../blobs/{path.name}')
  hf.import_(str(cached), str(tmp_path / 'out'))
  assert (tmp_path / 'out' / 'tokenizer' / 'merges.txt').read_text() == '#version: 0.2\n'
  assert not any(path.is_symlink() for path in (tmp_path / 'out').rglob('*'))


RL = """
from betarank.configs import common

def get_config(arg=None):
  c = common.rl_base()
  c.train.init_from = 'tuned'
  c.rl.update(steps=1, prompts_per_step=2, group_size=2, max_resampling_rounds=1, max_prompt_tokens=64,
              max_new_tokens=(8,), phase_steps=(), decode_batch_size=4, eval_prompts=2, eval_samples=2)
  c.rl.task.uri = 'reasoning:chain_sum?max_terms=2&max_digits=1'
  c.optimizer.warmup_steps = 0
  return c
"""


@pytest.fixture(params=['made here', 'Qwen3', 'Qwen3Moe', 'Qwen2', 'Llama'])
def published(request, tmp_path):
  """Returns (folder, the architecture that its config names). The folder is `qwen`, or one written by transformers."""
  if request.param == 'made here':
    return request.getfixturevalue('qwen'), 'Qwen3ForCausalLM'
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  sizes = dict(vocab_size=416, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
               head_dim=16, intermediate_size=48, max_position_embeddings=40_960)
  if request.param == 'Qwen3Moe':
    sizes |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=False)
  torch.manual_seed(0)
  config = getattr(transformers, f'{request.param}Config')(**sizes)
  theirs = getattr(transformers, f'{request.param}ForCausalLM')(config)
  theirs.to(torch.bfloat16).save_pretrained(tmp_path / 'hf')
  tokenizer_files.byte_level(tmp_path / 'hf', 'llama3' if request.param == 'Llama' else 'qwen')
  return tmp_path / 'hf', f'{request.param}ForCausalLM'


def tensors(folder):
  """Returns {name: (dtype, shape, bytes)} of the weights in a folder."""
  raw = (folder / 'model.safetensors').read_bytes()
  start = 8 + int.from_bytes(raw[:8], 'little')
  header = json.loads(raw[8:start])
  header.pop('__metadata__', None)
  return {name: (about['dtype'], about['shape'], raw[start + about['data_offsets'][0]:start + about['data_offsets'][1]])
          for name, about in header.items()}


@pytest.mark.slow
def test_an_imported_model_goes_through_every_command(published, tmp_path):
  """Runs import, prepare, train, rl, eval and export. The exported tokenizer equals the imported one.

  Weights that weren't trained are also exported as they were imported.
  """
  folder, architecture = published

  def betarank(*command):
    done = subprocess.run([*BETARANK, *command], capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout

  betarank('hf', 'import', f'--from={folder}', '--to=base')
  hf.export(str(tmp_path / 'base'), str(tmp_path / 'untouched'), dtype='bfloat16')
  assert tensors(tmp_path / 'untouched') == tensors(folder)
  data = ['--config=base/config.json', '--config.data.dir=data', '--config.data.sources.main.max_documents=300',
          '--config.data.sequence_length=32', '--config.data.validation_fraction=0.1',
          '--config.data.held_out_fraction=0.02']
  betarank('data', 'prepare', *data, '--workers=1')
  betarank('train', *data, '--config.train.tokens=512', '--config.train.batch_size=8',
           '--config.optimizer.warmup_steps=1', '--workdir=tuned')
  assert checkpoint.find(str(tmp_path / 'tuned')).name == '2'
  (tmp_path / 'rl.py').write_text(RL)
  betarank('rl', '--config=rl.py', '--workdir=rl')
  betarank('eval', 'probe', '--checkpoint=tuned', '--config.eval.probe.rows=8')
  betarank('eval', 'sample', '--checkpoint=rl', '--benchmark=reasoning:chain_sum', '--config.eval.sample.problems=2',
           '--config.eval.sample.samples=2', '--config.eval.sample.max_new_tokens=8')
  assert architecture in betarank('hf', 'export', '--checkpoint=rl', '--to=out')
  for name in TOKENIZER_FILES:
    if (folder / name).exists():
      assert (tmp_path / 'out' / name).read_bytes() == (folder / name).read_bytes(), name
  manifest = json.loads((tmp_path / 'data' / 'main' / '1.0.0' / 'manifest.json').read_text())
  assert manifest['settings']['tokenizer_sha256'] == spm.sha256_of(str(tmp_path / 'out'))
  bits = json.loads(next((tmp_path / 'tuned' / 'eval' / 'probe').glob('*.json')).read_text())
  assert 0 < bits['domains']['main']['bits_per_byte'] < 20
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['max_position_embeddings'] == 40_960
  check_transformers_reads(tmp_path / 'out', folder)


def check_transformers_reads(folder, source):
  """Checks that transformers finds all weights in `folder`, and that its tokenizer gives the same ids as that of
  `source`.

  Does nothing if transformers isn't installed.
  """
  if importlib.util.find_spec('transformers') is None:
    return
  import transformers
  _, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
  assert not any(info[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys', 'error_msgs'))
  before, after = (transformers.AutoTokenizer.from_pretrained(path) for path in (source, folder))
  ours = read_tokenizer(str(source))
  for text in [*TEXT, '', ' ', '<|im_end|> <think>', 'e\u0301 \U0010ffff \0', 'the sum of 12 ' * 20]:
    ids = after(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert ids == before(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert ids == ours.encode(text).tolist(), text


@pytest.mark.parametrize('options, message', [
  (dict(model_type='unigram'), 'is not BPE'),
  (dict(byte_fallback=False), 'has no byte fallback'),
  (dict(add_dummy_prefix=True), 'puts a space before the text'),
  (dict(normalization_rule_name='nfkc'), r'normalises text \(nfkc\)'),
])
def test_tokenizers_that_change_the_text(options, message, tmp_path):
  import sentencepiece
  settings = dict(model_type='bpe', vocab_size=310, byte_fallback=True, normalization_rule_name='identity',
                  add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2, hard_vocab_limit=False)
  path = tmp_path / 't.model'
  with path.open('wb') as file:
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT * 9), model_writer=file, **settings | options)
  with pytest.raises(HfError, match=message):
    hf_tokenizer.convert(path.read_bytes(), 't.model')
  with pytest.raises(HfError, match='not a SentencePiece model'):
    hf_tokenizer.convert(b'no model', 't.model')
