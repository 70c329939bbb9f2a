"""A simulated GPU for a CPU-only torch: what it shows and what it cannot is in README.md."""
