"""Evaluates models: what they predict token by token, and how they answer benchmarks. Also compares runs, and writes
reports.
"""
