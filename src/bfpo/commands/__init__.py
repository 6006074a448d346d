"""The command line, and the work of commands that belong to no other package."""
