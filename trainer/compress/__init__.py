"""Distillation, pruning, quantisation and export."""
