"""Target `remote-code`: a folder with its own modelling file, for models that no stock class carries."""
