"""Programs behind every figure quoted in docs/; each writes benchmarks/results/*.json. None is imported by another
program than these."""
