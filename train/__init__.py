"""Pre-training. `betarank train` runs loop.py; score.py is where model and objective meet."""
