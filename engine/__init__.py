"""Set-up shared by all commands, the training loop, checkpoints, evaluation."""
