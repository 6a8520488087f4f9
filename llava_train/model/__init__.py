"""The model: encoder, connector and LLM as transformers' own Llava class."""
