"""All that travels between the trainer and the rollout nodes: prompts and answers one way, weights
the other."""
