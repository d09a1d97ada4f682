"""What `scripts/bench.py` is made of: rows, peers, the processes they run in, and the report.

The benchmarks are a program, not an entry point: what they do is of use to nobody who installs ldm, so they
lie here and not in the package.
"""
