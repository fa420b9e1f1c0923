"""The one training loop and its parts: state, checkpoints, optimizers, schedules, precision."""
