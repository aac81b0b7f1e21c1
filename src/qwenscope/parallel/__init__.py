"""Several processes as one run: what they tell each other, and who owns, harvests and decides what."""
