"""Implements reinforcement learning with verifiable rewards. loop.py runs the steps."""
