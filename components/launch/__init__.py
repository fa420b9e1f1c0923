"""Training jobs and searches on a cluster: what is asked for, the objects that ask for it, and what starts and watches them.

Run in the launcher's image as `python -m components.launch`. A launcher that waits must stay small: nothing here imports
torch, numpy, kfp or the Kubernetes client at run time.
"""
