"""A small script a dataset: `python -m data_prep.<name> --out DIR` fetches, checks and writes LLaVA JSON."""
