"""Times the head in PyTorch, to compare with `benchmarks.objective`: python -m benchmarks.torch_head

The benchmark computes cross-entropy from hidden states and a head, forward and backward, in bfloat16 with float32
logits:

    torch            as written; it holds all logits
    torch.compile    the same with the softmax fused with the operations around it; it holds all logits in bfloat16
    torch, chunked   4096 tokens at a time under torch.compile, with the gradients of each chunk computed at once; the
                     head's gradient is added up in float32

The benchmark prints the median time of --repeats runs, and the peak memory without the inputs and their gradients.
--grid=NxDxV sets the sizes.
"""
# N tokens  D width  V vocabulary

import argparse
import statistics

CHUNK = 4096  # tokens


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--grid', default='32768x2048x131072', help='tokens x D x V')
  parser.add_argument('--repeats', type=int, default=5)
  args = parser.parse_args()
  try:
    import torch
    from torch.nn import functional as F
  except ImportError:
    parser.error('PyTorch is not installed: pip install torch')
  if not torch.cuda.is_available():
    parser.error('PyTorch sees no GPU')
  tokens, width, vocab = map(int, args.grid.split('x'))
  torch.manual_seed(0)
  h_ND = torch.randn(tokens, width, device='cuda', dtype=torch.bfloat16, requires_grad=True)
  w_VD = (torch.randn(vocab, width, device='cuda') * width**-0.5).to(torch.bfloat16).requires_grad_()
  x_N = torch.randint(vocab, (tokens,), device='cuda')

  def total(h_ND, w_VD, x_N):
    return F.cross_entropy((h_ND @ w_VD.T).float(), x_N, reduction='sum')

  def whole(total):
    def run():
      (total(h_ND, w_VD, x_N) / tokens).backward()
    return run

  def chunked(total):
    def run():
      w_grad, h_grads = torch.zeros_like(w_VD, dtype=torch.float32), []
      for h_CD, x_C in zip(h_ND.detach().split(CHUNK), x_N.split(CHUNK)):
        of = h_CD.requires_grad_(), w_VD
        h_grad, part = torch.autograd.grad(total(*of, x_C) / tokens, of)
        h_grads.append(h_grad)
        w_grad += part
      h_ND.grad, w_VD.grad = torch.cat(h_grads), w_grad.to(w_VD.dtype)
    return run

  print(f'tokens {tokens}  D {width}  V {vocab}  bfloat16  ({torch.cuda.get_device_name()}, torch {torch.__version__})')
  print(f'{"":30}{"ms":>10}{"memory GB":>12}')
  compiled = torch.compile(total, dynamic=False)  # otherwise the second size would be compiled for all sizes
  for name, run in (('torch', whole(total)), ('torch.compile', whole(compiled)), ('torch, chunked', chunked(compiled))):
    milliseconds = []
    try:
      for n in range(args.repeats + 2):  # the first two compile and warm up
        h_ND.grad = w_VD.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() + h_ND.nbytes + w_VD.nbytes
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if n > 1:
          milliseconds.append(start.elapsed_time(end))
      memory = (torch.cuda.max_memory_allocated() - before) / 1e9
      print(f'{name:30}{statistics.median(milliseconds):10.1f}{memory:12.2f}', flush=True)
    except torch.cuda.OutOfMemoryError:
      print(f'{name:30}{"out of memory":>22}', flush=True)


if __name__ == '__main__':
  main()
