"""betarank explore RUN [RUN ...] [--task=URI]              serves a page on this machine, until Ctrl-C
betarank explore RUN [RUN ...] --export=FILE --text=TEXT   writes the view of a text as one HTML file

The page shows what each checkpoint predicts, token by token. Type a text, or pick a document of the validation data or
a problem. RUN is a checkpoint, or a workdir, whose newest checkpoint is used. All checkpoints must have the same
tokenizer.

    betarank explore runs/smoke/reasoning/beta=0 runs/smoke/reasoning/beta=-0.25
"""

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from betarank.configs.errors import UserError
from betarank.configs.parser import Parser, above_zero, line_ends, place
from betarank.configs.stop import importing, leave
from betarank.configs.terminal import waiting


def main(argv: Sequence[str]) -> None:
  """Runs the command until Ctrl-C or, with --export, until the file is written.

  Raises:
    UserError: an argument is not allowed.
  """
  parser = Parser('betarank explore', __doc__)
  parser.add_argument('run', nargs='+', type=place, metavar='RUN', help='a workdir or a checkpoint; local or gs://')
  parser.add_argument('--tokenizer', type=place, metavar='PATH',
                      help='where the tokenizer is, if not where it was in training')
  parser.add_argument('--task', default='', metavar='URI', help='problems to ask, such as reasoning:chain_sum or '
                      "jsonl:FILE; default: the run's own")
  parser.add_argument('--top_k', type=int, default=0, help="tokens that make up the head; default: objective.top_k of "
                      'the first run')
  parser.add_argument('--port', type=int, default=0, help='of the page; default: any that is free')
  parser.add_argument('--export', type=place, metavar='FILE.html', help='write one view to a file, and serve nothing')
  parser.add_argument('--text', type=line_ends, help=r'the text to export; \n is a line end, \\ a backslash')
  parser.add_argument('--problem', type=int, help='the problem to export, by its number, in place of a text')
  parser.add_argument('--samples', type=above_zero(int),
                      help='continuations per checkpoint in the export (default 4)')
  parser.add_argument('--max_new_tokens', type=above_zero(int), help='longest of these, in tokens (default 64)')
  args = parser.parse_args(argv)
  if args.export and (args.text is None) == (args.problem is None):
    raise UserError('--export: name what to show, --text=TEXT or --problem=NUMBER')
  for name in ('text', 'problem', 'samples', 'max_new_tokens'):
    if not args.export and getattr(args, name) is not None:
      raise UserError(f'--{name} is for --export=FILE.html; the page has a field for it')
  if args.top_k < 0:
    raise UserError(f'--top_k must be >= 1, or 0 for the one of the first run, got {args.top_k}')
  _run(args)
  if not args.export:
    leave(0)  # a request that was interrupted may still be computed


def _run(args: argparse.Namespace) -> None:
  with importing('starting JAX'):
    from betarank.eval.explore import views
    from betarank.eval.loaded import load_model
    from betarank.tasks.verifiers import Verifier, VerifierConfig

  models = []
  for path in args.run:
    print(f'loading {path}', file=sys.stderr, flush=True)
    models.append(load_model(path, args.tokenizer))
  views.check_same_tokens(models)
  with Verifier(VerifierConfig(workers=1)) as verifier:
    explorer = views.Explorer(models, args.top_k or models[0].run.top_k, views.open_sources(models[0]),
                              views.open_tasks(models, args.task), verifier)
    if args.export:
      _export(args, explorer)
    else:
      _serve(args, explorer)


def _export(args: argparse.Namespace, explorer: Any) -> None:
  from etils import epath

  from betarank.configs.files import write_atomically
  from betarank.eval.explore import page
  from betarank.eval.loaded import Sampling

  samples, sampling = args.samples or 4, Sampling(max_new_tokens=args.max_new_tokens or 64)
  with waiting('compiling, predicting and sampling'):
    if args.problem is not None:
      view = explorer.problem(args.problem, samples, sampling)
    else:
      view = explorer.text(args.text, samples, sampling)
  write_atomically(epath.Path(args.export), page.exported(explorer.about(), view))
  print(f'{args.export}: written')


def actions(explorer: Any) -> dict[str, Any]:
  """Returns the functions that answer the requests of the page: {name: function}.

  Each function takes the request's JSON object, and returns a JSON value. It raises UserError if a value is not
  allowed, and KeyError, TypeError or ValueError if the request is malformed.
  """
  from betarank.eval.loaded import Sampling

  def sampling(request: Mapping[str, Any]) -> Sampling:
    return Sampling(float(request['temperature']), float(request['top_p']), _whole(request['max_new_tokens']),
                    _whole(request['seed']))

  return {
    'about': lambda _: explorer.about(),
    'text': lambda r: explorer.text(_string(r['text'])),
    'continue': lambda r: explorer.text(_string(r['text']), _whole(r['samples']), sampling(r)),
    'document': lambda r: explorer.document(_string(r['source']), _whole(r['index'])),
    'problem': lambda r: explorer.problem(_whole(r['index']), _whole(r['samples']), sampling(r)),
  }


def _whole(value: Any) -> int:
  if not isinstance(value, int) or isinstance(value, bool):
    raise TypeError(f'expected a whole number, got {type(value).__name__}')
  return value


def _string(value: Any) -> str:
  if not isinstance(value, str):
    raise TypeError(f'expected text, got {type(value).__name__}')
  return value


def _serve(args: argparse.Namespace, explorer: Any) -> None:
  from betarank.eval.explore import page
  from betarank.eval.explore.server import Server

  try:
    server = Server(page.served(), actions(explorer), args.port)
  except (OSError, OverflowError) as error:
    raise UserError(f'--port={args.port}: {getattr(error, "strerror", None) or error}') from None
  with server:
    print(f'{server.url}\nCtrl-C ends. Only this machine can open the page; from another one: '
          f'ssh -L {server.server_address[1]}:127.0.0.1:{server.server_address[1]} HOST', flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # the usual end
      server.serve_forever()
    print()
