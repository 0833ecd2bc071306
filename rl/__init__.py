"""Reinforcement learning with verifiable rewards. loop.py runs it: sample, judge, compute advantages, update."""
