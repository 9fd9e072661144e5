"""What the four stage scripts share: command line, checkpoints, metrics, the optimiser, runs."""
