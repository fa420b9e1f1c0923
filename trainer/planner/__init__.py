"""What a run needs before a GPU is asked for: memory by part, time, cost, and the mesh that suits it. Imports no torch.

`shape` counts parameters and arithmetic, `activations` and `memory` bytes, `throughput` seconds; `search` chooses, and
says what would fit where nothing does. Figures are those of this code, checked against it in tests/unit/test_planner*.py.
"""
