"""From a model, a job and a budget to a plan: sizes, memory, time, search, advice."""
