"""Samples -> a prepared set: pieces made by a pool of processes, faults judged, the composition counted."""
