"""Times a PyTorch loop that samples, to compare with `benchmarks.rollout --size=1b`: python -m benchmarks.torch_rollout

The model has the shapes of `benchmarks.train --model=1b` and random bfloat16 weights. 16 samples are drawn for each of
16 prompts. Each prompt is processed once, and its keys and values are copied to the rows of its samples. A step of all
rows is compiled (torch.compile) and runs as one CUDA graph. Its attention is a Triton kernel that reads only the filled
slots of each row. Tokens are drawn from the full distribution with their log-probabilities, as RL needs them, and no
token ends an answer. The benchmark prints the fastest of --repeats runs, after one run that compiles.

Without a GPU there is no CUDA graph, and attention reads the whole cache with a mask.
"""
# B rows  T tokens of a prompt  K key heads  G query heads per key head  H head width  S slots of the cache  D width

import argparse
import time

from benchmarks.train import MODELS

try:
  import torch
  from torch.nn import functional as F
except ImportError:
  torch = None
try:
  import triton
  import triton.language as tl
except ImportError:  # PyTorch for CPUs doesn't bring it
  triton = None

if triton:
  @triton.jit
  def attend_kernel(q_ptr, k_ptr, v_ptr, out_ptr, length_ptr, row_stride, head_stride, scale: tl.constexpr,
                    G: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr):
    row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    length = tl.load(length_ptr)
    g = tl.arange(0, 16)  # tl.dot takes no fewer
    h, s = tl.arange(0, H), tl.arange(0, BLOCK)
    q_at = ((row * heads + head) * G + g[:, None]) * H + h[None, :]
    q = tl.load(q_ptr + q_at, mask=g[:, None] < G, other=0.0)
    base = row.to(tl.int64) * row_stride + head * head_stride
    most, total = tl.full((16,), -1e30, tl.float32), tl.zeros((16,), tl.float32)
    out = tl.zeros((16, H), tl.float32)
    for start in range(0, length, BLOCK):
      at = start + s
      inside = at < length
      k = tl.load(k_ptr + base + at[:, None] * H + h[None, :], mask=inside[:, None], other=0.0)
      v = tl.load(v_ptr + base + at[:, None] * H + h[None, :], mask=inside[:, None], other=0.0)
      z = tl.where(inside[None, :], tl.dot(q, tl.trans(k)) * scale, -1e30)
      top = tl.maximum(most, tl.max(z, 1))
      p, shrink = tl.exp(z - top[:, None]), tl.exp(most - top)
      total = total * shrink + tl.sum(p, 1)
      out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v)
      most = top
    tl.store(out_ptr + q_at, (out / total[:, None]).to(q.dtype), mask=g[:, None] < G)


def attend(q_BKGH, k_BKSH, v_BKSH, length):
  """Returns the attention of each row's token to the first `length` slots, [B, K, G, H]. length: int32 [1]."""
  if not q_BKGH.is_cuda:
    mask_S = torch.arange(k_BKSH.shape[2], device=length.device) < length
    return F.scaled_dot_product_attention(q_BKGH, k_BKSH, v_BKSH, attn_mask=mask_S[None, None, None])
  out, (b, k, g, h) = torch.empty_like(q_BKGH), q_BKGH.shape
  attend_kernel[(b, k)](q_BKGH, k_BKSH, v_BKSH, out, length, k_BKSH.stride(0), k_BKSH.stride(1), scale=h**-0.5,
                        G=g, H=h, BLOCK=64, num_warps=4, num_stages=3)
  return out


def norm(c, x, scale):
  y = x.float()
  return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + c.norm_eps)).to(x.dtype) * scale


def rotate(x, cos, sin):
  a, b = x.float().chunk(2, -1)
  return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Model:
  """A decoder with random weights."""

  def __init__(self, c, device, dtype):
    normal = lambda *shape: (torch.randn(shape, device=device) * 0.02).to(dtype)
    ones = lambda n: torch.ones(n, device=device, dtype=dtype)
    self.c, self.embed_VD, self.norm = c, normal(c.vocab_size, c.d_model), ones(c.d_model)
    self.layers = [dict(
      norm1=ones(c.d_model), norm2=ones(c.d_model), q_norm=ones(c.head_dim), k_norm=ones(c.head_dim),
      qkv=normal((c.heads + 2 * c.kv_heads) * c.head_dim, c.d_model), out=normal(c.d_model, c.heads * c.head_dim),
      gate_up=normal(2 * c.d_ff, c.d_model), down=normal(c.d_model, c.d_ff)) for _ in range(c.layers)]
    self.frequency = c.rope_base ** (-torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim)

  def qkv(self, w, x, cos, sin):
    """Returns queries, keys and values, [..., heads, H]."""
    c = self.c
    y = F.linear(norm(c, x, w['norm1']), w['qkv']).unflatten(-1, (-1, c.head_dim))
    q, k, v = y.split((c.heads, c.kv_heads, c.kv_heads), -2)
    return rotate(norm(c, q, w['q_norm']), cos, sin), rotate(norm(c, k, w['k_norm']), cos, sin), v

  def rest(self, w, x, attended):
    x = x + F.linear(attended, w['out'])
    gate, up = F.linear(norm(self.c, x, w['norm2']), w['gate_up']).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, w['down'])

  def draw(self, x_BD):
    """Returns a token of each row, by Gumbel's trick, and its log-probability."""
    z_BV = F.linear(norm(self.c, x_BD, self.norm), self.embed_VD).float()
    noise_BV = -torch.log(-torch.log(torch.rand_like(z_BV).clamp_(1e-20, 1 - 1e-7)))
    token_B = (z_BV + noise_BV).argmax(-1)
    return token_B, z_BV.gather(-1, token_B[:, None])[:, 0] - z_BV.logsumexp(-1)

  def prefill(self, token_PT, caches, samples):
    """Fills the first T slots of the rows of each prompt's `samples`. Returns what `draw` returns."""
    t, x = token_PT.shape[1], self.embed_VD[token_PT]
    angle = torch.arange(t, device=token_PT.device).float()[:, None] * self.frequency
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    for w, (k_BKSH, v_BKSH) in zip(self.layers, caches):
      q, k, v = (y.transpose(1, 2) for y in self.qkv(w, x, cos, sin))
      k_BKSH[:, :, :t] = k.repeat_interleave(samples, 0)
      v_BKSH[:, :, :t] = v.repeat_interleave(samples, 0)
      attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
      x = self.rest(w, x, attended.transpose(1, 2).flatten(2))
    return self.draw(x[:, -1].repeat_interleave(samples, 0))

  def step(self, token_B, length, caches):
    """Returns what `draw` returns for the next token. length: int32 [1], the number of filled slots; it grows by 1."""
    angle = length.float()[:, None] * self.frequency
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    x, more = self.embed_VD[token_B], length + 1
    for w, (k_BKSH, v_BKSH) in zip(self.layers, caches):
      q, k, v = self.qkv(w, x, cos, sin)
      k_BKSH.index_copy_(2, length.long(), k[:, :, None])
      v_BKSH.index_copy_(2, length.long(), v[:, :, None])
      q = q.unflatten(1, (self.c.kv_heads, -1)).contiguous()
      x = self.rest(w, x, attend(q, k_BKSH, v_BKSH, more).flatten(1))
    length += 1
    return self.draw(x)


def sampler(c, prompts, samples, prompt_tokens, new_tokens):
  """Returns a function seed -> number of tokens drawn."""
  on_gpu = torch.cuda.is_available()
  device, dtype = ('cuda', torch.bfloat16) if on_gpu else ('cpu', torch.float32)
  lm, rows = Model(c, device, dtype), prompts * samples
  caches = [tuple(torch.zeros(rows, c.kv_heads, prompt_tokens + new_tokens, c.head_dim, device=device, dtype=dtype)
                  for _ in range(2)) for _ in range(c.layers)]
  token_B = torch.zeros(rows, dtype=torch.long, device=device)
  logp_B = torch.zeros(rows, device=device)
  length = torch.full((1,), prompt_tokens, dtype=torch.int32, device=device)
  step = torch.compile(lambda token_B, length: lm.step(token_B, length, caches))

  def advance():
    for kept, new in zip((token_B, logp_B), step(token_B, length)):
      kept.copy_(new)

  if on_gpu:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.inference_mode():
      for _ in range(3):  # compiles
        advance()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
      advance()

  def run(seed):
    torch.manual_seed(seed)
    token_PT = torch.randint(4, c.vocab_size, (prompts, prompt_tokens), device=device)
    with torch.inference_mode():
      drawn = [lm.prefill(token_PT, caches, samples)]
      token_B.copy_(drawn[0][0])
      length.fill_(prompt_tokens)
      for _ in range(new_tokens - 1):
        graph.replay() if on_gpu else advance()
        drawn.append((token_B.clone(), logp_B.clone()))
    return torch.stack([token_B for token_B, _ in drawn], 1).cpu().numel()

  return run


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', choices=[name for name in MODELS if 'moe' not in name], default='1b')
  parser.add_argument('--sizes', default='16x16x1024x1024', help='prompts x samples x prompt tokens x new tokens')
  parser.add_argument('--repeats', type=int, default=2)
  args = parser.parse_args()
  if torch is None:
    parser.error('PyTorch is not installed: pip install torch')
  torch.set_float32_matmul_precision('high')
  run = sampler(MODELS[args.model][0], *map(int, args.sizes.split('x')))
  run(0)
  rates = []
  for n in range(args.repeats):
    start = time.perf_counter()
    rates.append(run(1 + n) / (time.perf_counter() - start))
  device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'
  print(f'{max(rates):,.0f} tokens/s  ({device}, torch {torch.__version__}, {args})')


if __name__ == '__main__':
  main()
