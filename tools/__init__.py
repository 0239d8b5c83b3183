"""Not needed to train: benches, export and check of checkpoints, fault injection."""
