"""A language model: load it, sample from it, and compute log-probabilities under it."""
