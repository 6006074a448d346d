"""`python -m bfpo` is the same as the `bfpo` command."""

from bfpo.commands.app import main

if __name__ == "__main__":
    main()
