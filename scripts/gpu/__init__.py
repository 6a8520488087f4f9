"""The parts of bench_gpu.py: cases, shapes and samples, the two sides, the checks, processes, report."""
