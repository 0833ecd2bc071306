"""Predicts the memory, time and transfers of MaxText's training step on a TPU pod, as `betarank plan` does for ours.

    python -m benchmarks.maxtext v5e-256 model_name=qwen3-4b per_device_batch_size=4 [KEY=VALUE ...]

The step is compiled, not run. This needs MaxText (pip install maxtext, then the packages that its imports ask for),
and the versions of jax and libtpu in launch/constraints.txt. MaxText's own train_compile compiles the step, so every
KEY=VALUE is a setting of MaxText. XLA flags can be given in LIBTPU_INIT_ARGS, as on a TPU. docs/plans.md has the
settings that were compared.
"""

import argparse
import importlib.util
import pathlib
import tempfile

from betarank.launch.plan import chips, hlo, predict
from betarank.launch.plan.command import configure_libtpu

FIXED = ('override_model_config=true', 'dataset_type=synthetic', 'enable_checkpointing=false', 'run_name=plan',
         'compile_topology_num_slices=1')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('topology', metavar='TOPOLOGY')
  parser.add_argument('settings', nargs='*', metavar='KEY=VALUE')
  args = parser.parse_args()
  try:
    topology = chips.topology(args.topology)
  except chips.PlanError as error:
    parser.error(str(error))
  for setting in args.settings:
    if '=' not in setting:
      parser.error(f'{setting}: expected KEY=VALUE')
  if not importlib.util.find_spec('maxtext'):
    parser.error('MaxText is not installed: pip install maxtext')
  measure(topology, args.settings)


def measure(topology: chips.Topology, settings: list[str]) -> None:
  with tempfile.TemporaryDirectory() as place:
    folder = pathlib.Path(place) / 'bundles'
    folder.mkdir()
    configure_libtpu(folder, True)
    import jax  # after the environment was set
    import maxtext
    from maxtext.trainers.pre_train import train_compile
    kept, compile_step = [], jax.stages.Lowered.compile

    def compile_and_keep(self, *args, **kwargs):
      kept.append(compile_step(self, *args, **kwargs))
      return kept[-1]

    jax.stages.Lowered.compile = compile_and_keep
    base = pathlib.Path(maxtext.__file__).parent / 'configs/base.yml'
    train_compile.main(['', str(base), f'compile_topology={topology.name}', f'base_output_directory={place}',
                        *FIXED, *settings])
    temporary, peak = predict.memory_bytes(kept[-1].memory_analysis())
    found = predict.predict(hlo.read(kept[-1].as_text()), folder, topology)
  print(f'temporary {temporary / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB')
  print(f'step {1e3 * found.step_s[1]:.0f} to {1e3 * found.step_s[0]:.0f} ms, of which transfers that compute does not '
        f'hide {1e3 * found.exposed_s:.0f} ms')
  print(', '.join(f'{kind} {size / 1e9:.2f} GB' for kind, size in sorted(found.collective_bytes.items())))
  print(', '.join(f'{name} {1e3 * seconds:.0f} ms' for name, seconds in found.hottest))


if __name__ == '__main__':
  main()
