"""Metrics, significance, baselines and the report."""
