"""Reads one epoch of prepared data, as training reads it, and logs every 50 steps: python -m tests.soak.walk
CONFIG.json
"""

import json
import pathlib
import sys

from betarank.data import TrainBatches
from betarank.data.config import DataConfig, SourceConfig
from tests.soak.loads import ROWS


def main():
  path = pathlib.Path(sys.argv[1])
  config = json.loads(path.read_text())
  config['sources'] = {name: SourceConfig(**source) for name, source in config['sources'].items()}
  config = DataConfig(**config)
  batches = TrainBatches(config, batch_size=ROWS, seed=0)
  rows = batches.stats['main'].rows_per_epoch
  steps, pairs = -(-rows // ROWS), 0
  with open(path.with_suffix('.jsonl'), 'w', encoding='utf-8') as out:
    for step in range(1, steps + 1):
      batch = next(batches)
      of_epoch = batch.segments_BT[: rows - (step - 1) * ROWS]  # the last batch also has rows of the next epoch
      pairs += int((of_epoch > 0).sum())
      if step % 50 == 0 or step == steps:
        out.write(json.dumps({'step': step, 'pairs': pairs}) + '\n')
        out.flush()
  batches.close()


if __name__ == '__main__':
  main()
