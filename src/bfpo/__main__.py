"""`python -m bfpo` is the same as the `bfpo` command."""

from bfpo.cli import main

if __name__ == "__main__":
    main()
