"""The benchmark suite: small named benchmarks that write JSON, and the tables made from it."""
