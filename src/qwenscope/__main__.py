"""`python -m qwenscope` is the same command as `qwenscope`, and works under `torchrun`."""

from qwenscope.cli import main

main()
