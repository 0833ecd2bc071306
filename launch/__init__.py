"""Starts runs: sweeps of a config file, TPU slices through gcloud, and plans for a pod before it is rented."""
