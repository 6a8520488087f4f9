"""Answering others over HTTP, as OpenAI's API does."""
