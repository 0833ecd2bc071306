"""Starts runs: the sweep of a config file, TPU slices through gcloud, and plans for a pod before it is rented."""
