"""Runs `betarank COMMAND ...`. `python -m betarank COMMAND ...` does the same.

Each command is a module with a function `main(argv)`. Only the module of the chosen command is imported, so that help
and error messages appear quickly.
"""

import gc
import importlib
import signal
import sys

from betarank.configs import buckets
from betarank.configs.errors import Interrupted, UserError, run_main, suggestion
from betarank.configs.stop import importing, interruptible, leave

# Command -> (module, its line in `betarank --help`), in the order in which a project needs them.
COMMANDS = {
  'data': ('data.command', 'train a tokenizer; tokenize, index, verify or show data'),
  'train': ('train.command', 'pre-train a model'),
  'rl': ('rl.command', 'continue a model with reinforcement learning on verifiable rewards'),
  'eval': ('eval.command', 'probe a checkpoint, sample answers to a benchmark, or run lm-evaluation-harness'),
  'judge': ('tasks.command', 'judge answers as RL and evaluation do, and say why'),
  'generate': ('eval.prompt_command', 'continue a text with a model, token by token; interactive'),
  'explore': ('eval.explore.command', 'look at what checkpoints predict, token by token, side by side, in a browser'),
  'watch': ('eval.watch', 'show the state of running runs in a table, from their files'),
  'compare': ('eval.compare', 'print the metrics of several runs side by side, and plot their curves'),
  'report': ('eval.report.command', 'write an HTML report of all runs below a folder'),
  'sweep': ('launch.sweep', 'run the points of an experiment here, or on TPU slices'),
  'plan': ('launch.plan.command', 'compile a config for a TPU pod that is not here; predict memory, time and cost'),
  'checkpoint': ('runtime.checkpoint_command', 'inspect or verify checkpoints'),
  'hf': ('train.hf', 'export to, or import from, the Hugging Face format'),
  'config': ('configs.command', 'print a resolved config, or list the configs that ship'),
}


def usage() -> str:
  """Returns the text of `betarank --help`."""
  width = max(map(len, COMMANDS))
  lines = [f'  {name:{width}}  {text}' for name, (_, text) in COMMANDS.items()]
  return '\n'.join(['usage: betarank COMMAND [--help] ...', '', *lines, '',
                    'betarank COMMAND --help lists the flags and settings of a command.'])


def main() -> None:
  """Runs the command that the command line names. A UserError is printed as one line, and the exit status is then 2.

  After Ctrl-C the exit status is 130. A second Ctrl-C ends the process at once. A Ctrl-C after the command has ended
  doesn't change the exit status.
  """
  status = 0
  try:
    run_main(lambda: _run(sys.argv[1:]))
  except Interrupted:
    leave(130)
  except SystemExit as end:
    status = end.code if isinstance(end.code, int) else int(end.code is not None)  # a text is printed, and means 1
    raise
  finally:  # Python's own end may take seconds; a KeyboardInterrupt in it would be a traceback
    gc.freeze()  # without this, Python searches all objects for garbage several times: another second
    signal.signal(signal.SIGINT, lambda *_: leave(status))


def _run(argv: list[str]) -> None:
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print(usage())
    return
  name, *rest = argv
  if name not in COMMANDS:
    raise UserError(f'{name}: no such command{suggestion(name, COMMANDS)}; betarank --help lists them')
  with interruptible():
    with importing('starting'):
      buckets.register()
      command = importlib.import_module(f'betarank.{COMMANDS[name][0]}')
    command.main(rest)


if __name__ == '__main__':
  main()
