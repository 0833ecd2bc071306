"""Runs sweeps on this machine, on TPU slices, or through a scheduler such as Slurm. Predicts what a run takes on a pod.
"""
