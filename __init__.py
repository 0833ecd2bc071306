"""Pre-train language models with a reward-shaped next-token objective, and measure how that changes later RL."""
