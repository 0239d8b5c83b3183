"""What runs on every rank of the trainer: the grid and its collectives, kernels, the batch,
checkpoints, the plan."""
