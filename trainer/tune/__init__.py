"""The search for hyper-parameters on a laptop."""
