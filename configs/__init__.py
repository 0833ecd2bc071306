"""Experiments one can run (`smoke.py`, `paper/`), what they share (`common.py`), and their loader (`load.py`)."""
