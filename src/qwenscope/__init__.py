"""qwenscope: train, measure and release sparse autoencoders for large language models."""

__version__ = "0.1.0"
