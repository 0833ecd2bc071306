"""Reinforcement learning with verifiable rewards. `python -m rl` runs loop.py: sample, judge, advantage, update."""
