"""The parts of make_tiny_backbones.py: plan, language, vision."""
