"""Indices of what latents fire on: built, read, browsed, labelled; steering along them."""
