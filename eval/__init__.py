"""Evaluates what a training objective did to a model: its token distribution, its answers to benchmarks, and a
report.
"""
