"""Runs sweeps on this machine, on TPU slices or on another engine. Plans a run before TPU pods are rented for the run.
"""
