"""Artifact folders: manifests with digests, atomic publishing, and readers of datasets and model folders."""
