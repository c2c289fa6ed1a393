"""`python -m bitladder.cli`."""

from bitladder.cli import main

if __name__ == "__main__":
    main()
