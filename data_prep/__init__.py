"""A small script a dataset: `python -m data_prep.<name> --out DIR` fetches, checks and writes LLaVA JSON.

`--help` says what the data are, their licence and size. A new script is a docstring, a `Dataset` and `main`; that one
command, downloading, unpacking, pictures, parquet and records are in `common/`.
"""
