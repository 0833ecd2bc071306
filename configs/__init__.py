"""Holds the configs that ship with the package (`smoke.py`, `small.py`, `paper/`, `sweeps/`, ...), the code that they
share, and the loader (`load.py`).
"""
