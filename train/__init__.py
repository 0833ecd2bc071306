"""Pre-training. `python -m train` runs loop.py; score.py is where model and objective meet."""
