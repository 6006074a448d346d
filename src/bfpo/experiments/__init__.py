"""Studies: methods compared over seeds on the testbed, and the quickstart."""
