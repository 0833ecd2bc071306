"""Pre-training. loop.py runs it, and score.py connects the model with the objective."""
