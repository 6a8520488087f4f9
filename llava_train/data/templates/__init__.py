"""Chat templates: the Jinja files, which goes with which tokenizer, and marks for those that have none."""
