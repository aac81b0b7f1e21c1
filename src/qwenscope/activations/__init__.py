"""Residual-stream rows: harvested conversation by conversation, shuffled in windows, optionally kept on disk."""
