"""Starting runs: sweeps from config files, TPU slices through gcloud, and what is known of a pod before renting it."""
