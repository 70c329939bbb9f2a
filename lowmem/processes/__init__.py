"""Several processes, one for each device: who they are, what they agree on, what they share."""
