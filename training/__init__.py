"""A training run: its networks, data, optimizer, state, checks and record."""
