"""The graph and the people's side of it: command line, laptop engine."""
