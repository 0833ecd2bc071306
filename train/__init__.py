"""Implements pre-training. loop.py runs the training loop, and score.py connects the model with the objective."""
