"""What runs on every rank of the trainer: the grid and its collectives, operators, the batch,
checkpoints, the plan."""
