"""Reinforcement learning with verifiable rewards. `betarank rl` runs loop.py: sample, judge, advantage, update."""
