"""Kinds of models: what a batch's pictures become and how a decoder reads them. A class each, a row of the table."""
