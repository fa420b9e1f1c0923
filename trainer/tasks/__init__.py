"""What is learned: each task gives batches, loss terms and metrics."""
