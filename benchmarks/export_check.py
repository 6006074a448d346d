"""How far answers of exported GGUF files agree with those of their source, by transformers and by llama.cpp.

    python benchmarks/export_check.py FOLDER_OF_A_MODEL

It runs `bfpo export FOLDER --to gguf` for each type, and gathers what the product writes into `export.json`.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from bfpo.core.environment import hardware
from bfpo.core.files import write_json
from bfpo.deployment.export import export_checkpoint
from bfpo.deployment.gguf_export import GgufOptions
from bfpo.deployment.gguf_file import QUANTIZATIONS

RESULTS = Path(__file__).parent / "results" / "export.json"


def main() -> None:
    """Export a model to each type, and write the agreement of the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("--name", required=True, help="name of the model, for the results")
    options = parser.parse_args()
    files = {}
    for quantization in QUANTIZATIONS:
        with TemporaryDirectory() as folder:
            out = Path(folder) / options.name
            export_checkpoint(options.model, out, to="gguf", gguf=GgufOptions(quantization))
            files[quantization] = json.loads((out / "export.json").read_text(encoding="utf-8"))
            # A path of this machine says nothing; the identity is a hash of the content.
            del files[quantization]["source"]["path"]
    imported = options.model / "imported.json"
    origin = json.loads(imported.read_text(encoding="utf-8")) if imported.is_file() else None
    command = f"python benchmarks/export_check.py MODEL --name {options.name}"
    write_json(
        RESULTS,
        {"command": command, "model": options.name, "imported_from": origin, "hardware": hardware(), "files": files},
    )


if __name__ == "__main__":
    main()
