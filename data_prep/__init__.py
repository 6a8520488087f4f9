"""A small script a dataset: `python -m data_prep.<name> --out DIR` fetches, checks and writes LLaVA JSON.

`--help` says what the data are, their licence and size. A new script is a docstring, a `Dataset` (command.py) and
`main`; what it needs of downloading, unpacking, pictures, parquet and records is in the rooms beside it.
"""
