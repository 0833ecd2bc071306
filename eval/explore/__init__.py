"""Shows what a checkpoint predicts at each token of a text."""
