"""Execute the notebooks of the documentation and save them with their outputs.

    python docs/run_notebooks.py loss_and_theory
    BFPO_NOTEBOOK_MODEL=FOLDER python docs/run_notebooks.py real_model

A notebook runs in a temporary folder. What libraries print on the standard error stream isn't kept. Needs nbclient
and ipykernel, which are in the extra `dev`.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent / "notebooks"


def execute(notebook: Any, folder: Path, *, timeout: int = 600) -> Any:
    """Return an executed notebook without what was printed on the standard error stream.

    Args:
        notebook: The notebook; its outputs are replaced.
        folder: Folder that it runs in.
        timeout: Longest time of a cell, in seconds.
    """
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=timeout, resources=resources, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main(names: list[str]) -> None:
    """Execute and save the notebooks of these names; all without a name."""
    for path in [NOTEBOOKS / f"{name}.ipynb" for name in names] or sorted(NOTEBOOKS.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(nbformat.read(path, as_version=4), Path(folder)), path)


if __name__ == "__main__":
    main(sys.argv[1:])
