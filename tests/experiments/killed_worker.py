"""A unit whose worker process ends at once; a module of its own, so that the process has little to import."""

import os


def exit_hard(unit):
    os._exit(1)
