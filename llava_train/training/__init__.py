"""A run: engine, loop, state, monitor."""
