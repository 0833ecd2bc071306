"""Pre-training. loop.py runs it; score.py connects model and objective."""
