"""The embedded default: tiny backbones and the whole recipe on easy-vqa."""
