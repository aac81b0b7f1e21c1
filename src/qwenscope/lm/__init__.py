"""The language model: loading, forward passes, interventions, and the packaged stand-in."""
