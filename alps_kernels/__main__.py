"""`python -m alps_kernels` is the command `alps`."""

from .cli import main

main()
