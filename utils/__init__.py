"""What the four stage scripts share: command line, checkpoints, losses, metrics, runs."""
