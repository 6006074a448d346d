"""The report of evaluated runs, drawn from the files of their folders."""
