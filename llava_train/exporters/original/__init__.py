"""Targets `llava`, `llava-stage1` and `llava-lora`: the layout of the original LLaVA code."""
