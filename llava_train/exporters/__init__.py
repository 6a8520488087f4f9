"""Folders that chat back ends load; each proves itself after it is written."""
