"""The experiments that ship (`smoke.py`, `small.py`, `paper/`, `sweeps/`), what they share, and the loader
(`load.py`).
"""
