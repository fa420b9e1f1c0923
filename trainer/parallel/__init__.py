"""Local ranks, process groups and exit codes."""
