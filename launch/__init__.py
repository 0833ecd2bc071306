"""Runs sweeps on this machine, on TPU slices, or through a scheduler such as Slurm. Predicts the time, memory and cost
of a run on a TPU pod.
"""
