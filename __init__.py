"""Pre-train language models with a reward-shaped next-token objective, and measure what it does to RL."""
