"""Checkpoints of the original LLaVA code, read as a starting point."""
