"""The `qwenscope` command: argument handling only; imports every room, and none imports it."""

from qwenscope.cli.main import main

__all__ = ["main"]
