"""Times training steps of the same decoders in PyTorch, to compare with `benchmarks.train`.

    python -m benchmarks.torch_train --model=1b             # 8 x 4096 tokens per step: for an 80 GB accelerator
    python -m benchmarks.torch_train --model=64m            # configs/small.py
    python -m benchmarks.torch_train --model=317m --rows=16

The model is a plain decoder with the shapes of `benchmarks.train` and the same random tokens, one document per row. It
is compiled as a whole (torch.compile), and its attention is F.scaled_dot_product_attention, which chooses cuDNN's or
FlashAttention's kernels. The head and cross-entropy are computed for some tokens at a time, with the gradients of each
chunk computed at once. Parameters and AdamW's moments are float32, products bfloat16 (autocast). Nothing is
recomputed. Gradients are clipped by their global norm, as ours.

The benchmark prints tokens per second and MFU, counted as in `benchmarks.train`: from the median step when each is
waited for, and from steps that are dispatched one after the other, as with --steps there. Peak memory includes the
state, parameters and moments, unlike the temporary memory that `benchmarks.train` prints.
"""
# B rows  T tokens per row  N tokens  D width  V vocabulary  H head width

import argparse
import os
import statistics
import time
import types

import numpy as np

from benchmarks.train import MODELS
from betarank import model
from betarank.runtime.metrics import peak_flops


def decoder(torch, c, length):
  """Returns a module, tokens [B, T] -> hidden states [B, T, D] after the last norm, with random parameters."""
  from torch import nn
  from torch.nn import functional as F

  angle_TH = torch.arange(length).float()[:, None] * c.rope_base ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)

  class Norm(nn.Module):
    def __init__(self, width):
      super().__init__()
      self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
      return F.rms_norm(x.float(), x.shape[-1:], self.scale, c.norm_eps).to(x.dtype)

  def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)

  def rotate(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

  class Block(nn.Module):
    def __init__(self):
      super().__init__()
      self.norm1, self.norm2, self.q_norm, self.k_norm = map(Norm, (c.d_model, c.d_model, c.head_dim, c.head_dim))
      self.qkv = linear(c.d_model, (c.heads + 2 * c.kv_heads) * c.head_dim)
      self.out = linear(c.heads * c.head_dim, c.d_model)
      self.gate_up, self.down = linear(c.d_model, 2 * c.d_ff), linear(c.d_ff, c.d_model)

    def forward(self, x, cos, sin):
      q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (-1, c.head_dim)).split((c.heads, c.kv_heads, c.kv_heads), 2)
      q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
      attended = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True)
      x = x + self.out(attended.transpose(1, 2).flatten(2))
      gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
      return x + self.down(F.silu(gate) * up)

  class Decoder(nn.Module):
    def __init__(self):
      super().__init__()
      self.embed = nn.Embedding(c.vocab_size, c.d_model)
      self.blocks = nn.ModuleList(Block() for _ in range(c.layers))
      self.norm = Norm(c.d_model)
      self.register_buffer('cos', angle_TH.cos()[:, None])
      self.register_buffer('sin', angle_TH.sin()[:, None])
      for p in self.parameters():
        if p.ndim == 2:
          nn.init.normal_(p, std=0.02)

    def forward(self, token_BT):
      x = self.embed(token_BT).to(torch.bfloat16)
      for block in self.blocks:
        x = block(x, self.cos, self.sin)
      return self.norm(x)

  return Decoder()


def make_step(torch, c, token_BT, device, chunk):
  """Returns a function without arguments that runs a training step, and returns its loss.

  token_BT: int64 [B, T + 1].
  chunk: the number of tokens for which logits are computed at a time.
  """
  from torch.nn import functional as F

  lm = decoder(torch, c, token_BT.shape[1] - 1).to(device)
  run = torch.compile(lm)
  part = torch.compile(lambda h_CD, w_VD, x_C: F.cross_entropy((h_CD @ w_VD.T).float(), x_C, reduction='sum'))
  groups = [{'params': [p for p in lm.parameters() if (p.ndim == 2) == decays], 'weight_decay': 0.1 * decays}
            for decays in (True, False)]
  optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)
  token_BT = torch.from_numpy(token_BT).to(device)
  input_BT, target_N = token_BT[:, :-1].contiguous(), token_BT[:, 1:].flatten()

  def step():
    with torch.autocast(device, torch.bfloat16):
      hidden_BTD = run(input_BT)
    w_VD = lm.embed.weight.detach().to(torch.bfloat16).requires_grad_()
    w_grad_VD = torch.zeros_like(w_VD, dtype=torch.float32)
    total, h_grads = 0.0, []
    for h_CD, x_C in zip(hidden_BTD.detach().flatten(0, 1).split(chunk), target_N.split(chunk)):
      of = h_CD.requires_grad_(), w_VD
      loss = part(*of, x_C) / len(target_N)
      h_grad_CD, grad_VD = torch.autograd.grad(loss, of)
      h_grads.append(h_grad_CD)
      w_grad_VD += grad_VD
      total = total + loss.detach()
    hidden_BTD.backward(torch.cat(h_grads).view_as(hidden_BTD))
    lm.embed.weight.grad += w_grad_VD
    torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total

  return step


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', choices=[name for name in MODELS if 'moe' not in name], default='1b')
  parser.add_argument('--rows', type=int, default=0, help='per step; 0: the default of the model')
  parser.add_argument('--steps', type=int, default=10)
  args = parser.parse_args()
  os.environ.setdefault('PYTORCH_CUDA_ALLOC_CONF', 'expandable_segments:True')  # which is read when torch is imported
  try:
    import torch
  except ImportError:
    parser.error('PyTorch is not installed: pip install torch')
  torch.manual_seed(0)
  torch.set_float32_matmul_precision('high')
  c, rows, length = MODELS[args.model]
  rows = args.rows or rows
  on_gpu = torch.cuda.is_available()
  name = torch.cuda.get_device_name() if on_gpu else 'cpu'
  peak = peak_flops(types.SimpleNamespace(device_kind=name))
  wait = torch.cuda.synchronize if on_gpu else lambda: None
  token_BT = (np.random.default_rng(0).zipf(1.3, (rows, length + 1)) % c.vocab_size).astype(np.int64)
  chunk = 4096 if c.vocab_size > 65_536 else 65_536
  step = make_step(torch, c, token_BT, 'cuda' if on_gpu else 'cpu', chunk)
  for _ in range(5):  # the first compiles
    step()
  wait()
  if on_gpu:
    torch.cuda.reset_peak_memory_stats()
  seconds = []
  for _ in range(args.steps):
    start = time.perf_counter()
    step()
    wait()
    seconds.append(time.perf_counter() - start)
  start = time.perf_counter()
  for _ in range(args.steps):
    loss = step()
  wait()
  for way, step_s in (('waiting for each', statistics.median(seconds)),
                      ('without waiting', (time.perf_counter() - start) / args.steps)):
    flops = model.flops_per_token(c, length) * rows * length
    mfu = f'{flops / step_s / peak:.1%}' if peak else '-'
    print(f'{way:20}{step_s:9.3f} s{rows * length / step_s:12,.0f} tokens/s  MFU {mfu}')
  memory = f'{torch.cuda.max_memory_allocated() / 1e9:.1f} GB at the peak' if on_gpu else ''
  print(f'{name}, torch {torch.__version__}, {rows} x {length} tokens, '
        f'loss {float(loss):.4f} {memory}')


if __name__ == '__main__':
  main()
