"""From source files to tensors: sample, encode, prepare, plan, batch."""
