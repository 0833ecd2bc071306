r"""betarank generate --checkpoint=RUN [--prompt=TEXT] [--samples=N] [--temperature=X] [--top_p=X] [--max_new_tokens=N]

Continues a text, and prints the tokens as they are drawn. RUN is a checkpoint, or a workdir, whose newest checkpoint
is used. Without --prompt, each line of standard input is a prompt, until Ctrl-D. \n in a prompt stands for a line end,
and \\ for a backslash, so write \\neq for the LaTeX command \neq:

    betarank generate --checkpoint=runs/smoke/reasoning/beta=0 \
        --prompt='Question: State the final answer to the following arithmetic problem: 3 + 4 =\nSolution:'
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console

from betarank.configs.errors import UserError
from betarank.configs.parser import Parser, above_zero, line_ends, place
from betarank.configs.stop import importing
from betarank.configs.terminal import waiting


def main(argv: Sequence[str]) -> None:
  """Runs the command. Ctrl-C ends it with exit status 130.

  Raises:
    UserError: an argument is not allowed.
  """
  parser = Parser('betarank generate', __doc__)
  parser.add_argument('--checkpoint', required=True, type=place, metavar='RUN',
                      help='a workdir or a checkpoint; local or gs://')
  parser.add_argument('--tokenizer', type=place, metavar='PATH',
                      help='where the tokenizer is, if not where it was in training')
  parser.add_argument('--prompt', type=line_ends, metavar='TEXT',
                      help=r'text to continue; \n is a line end, \\ a backslash; default: each line of standard input')
  parser.add_argument('--samples', type=above_zero(int), default=1, help='continuations of each prompt (default 1)')
  parser.add_argument('--temperature', type=float, default=1.0, help='0: the most probable token (default 1)')
  parser.add_argument('--top_p', type=float, default=1.0, help='nucleus sampling; 1: off (default 1)')
  parser.add_argument('--max_new_tokens', type=int, default=256, help='longest continuation, in tokens (default 256)')
  parser.add_argument('--seed', type=int, default=0, help='the same seed gives the same continuations (default 0)')
  parser.add_argument('--entropy', action='store_true',
                      help='list the tokens of each continuation with probability, rank and entropy, at temperature 1')
  args = parser.parse_args(argv)
  _run(args)


def _run(args: argparse.Namespace) -> None:
  with importing('starting JAX', Console(stderr=True)):
    from betarank.eval import prompt
    from betarank.eval.loaded import Sampling, load_model

  sampling = Sampling(args.temperature, args.top_p, args.max_new_tokens, args.seed)
  with waiting(f'loading {args.checkpoint}', Console(stderr=True)):
    loaded = load_model(args.checkpoint, args.tokenizer)
  print(f'{loaded.name}, step {loaded.ref.step}, {loaded.objective}; the first tokens take a few seconds, to compile',
        file=sys.stderr, flush=True)
  texts = map(line_ends, _lines()) if args.prompt is None else [args.prompt]
  for number, text in enumerate(texts):
    prompt.generate(loaded, text, sampling, args.samples, number, args.entropy)


def _lines() -> Iterator[str]:
  """Yields the lines of standard input, except blank lines. Raises UserError if a line isn't UTF-8."""
  ask = sys.stdin.isatty()
  if ask:
    import readline  # noqa: F401 (importing it adds line editing and a history to `input`)
    print(r'Type a text to continue; \n is a line end, \\ a backslash. Ctrl-D ends.', file=sys.stderr, flush=True)
  while True:
    try:
      line = input('> ' if ask else '')
    except EOFError:
      if ask:
        print()
      return
    except UnicodeDecodeError as error:
      raise UserError(f'standard input is not {error.encoding.upper()} ({error.reason})') from None
    if line.strip():
      yield line
