"""What a run shows: progress, values per step, memory, traces and their pictures."""
