"""SAE trainers, and the run around them: sessions, checkpoints, signals, honest endings."""
