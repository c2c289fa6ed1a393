"""`python -m bitladder.cli`."""

from bitladder.cli import main

main()
