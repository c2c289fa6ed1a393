"""What serves the checkpoints. One module a runtime; each imports its runtime inside functions only."""
