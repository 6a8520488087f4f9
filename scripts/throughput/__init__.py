"""The parts of bench_throughput.py: models, records, sides, peers, measuring, report, sharing."""
