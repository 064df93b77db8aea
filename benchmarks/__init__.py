"""Times natrpb beside what people use without it; see docs/benchmarks.md, or `python -m benchmarks --help`."""
