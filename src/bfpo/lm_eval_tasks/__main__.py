"""`python -m bfpo.lm_eval_tasks` prints the folder for lm-eval's `--include_path`."""

import sys

from bfpo.lm_eval_tasks import FOLDER

sys.stdout.write(f"{FOLDER}\n")
