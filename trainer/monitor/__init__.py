"""Watching a run while it goes on: figures of its speed, files and services that get them, statistics, traces."""
