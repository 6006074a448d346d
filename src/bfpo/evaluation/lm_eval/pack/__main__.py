"""`python -m bfpo.evaluation.lm_eval.pack` prints the folder for lm-eval's `--include_path`."""

import sys

from bfpo.evaluation.lm_eval.pack import FOLDER

sys.stdout.write(f"{FOLDER}\n")
