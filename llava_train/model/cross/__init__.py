"""Pictures by cross-attention."""
