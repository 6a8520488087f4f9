"""What the data scripts share: the one command, downloading, unpacking, pictures, records, parquet."""
