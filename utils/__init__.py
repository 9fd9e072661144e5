"""What the stages and the analyses share: command line, files and checkpoints, metrics, tables, optimiser, runs."""
