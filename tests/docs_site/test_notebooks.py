"""The notebooks of the documentation run, and are saved with outputs that show no machine."""

import json
import re
import sys

import nbformat
import pytest

from bfpo.config.recipes import NewModel
from bfpo.model.new import new_model

from .blocks import ROOT

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_saved_small_with_outputs_and_without_paths(path):
    assert path.stat().st_size < 300_000
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = json.dumps([cell.outputs for cell in code])
    assert any(cell.outputs for cell in code)
    assert re.findall(r"/(?:home|tmp|root|work|usr|opt|Users)/[^\"]*", outputs) == []
    assert not re.search(r'"output_type": "error"|"name": "stderr"|\\u001b', outputs)


def execute(name, folder, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import run_notebooks

    return run_notebooks.execute(
        nbformat.read(ROOT / f"docs/notebooks/{name}.ipynb", as_version=4), folder, timeout=120
    )


def printed(notebook):
    texts = [
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    return "\n".join(texts)


@pytest.mark.slow
def test_the_notebook_on_the_loss_prints_what_is_saved(tmp_path, monkeypatch):
    saved = printed(nbformat.read(ROOT / "docs/notebooks/loss_and_theory.ipynb", as_version=4))
    again = printed(execute("loss_and_theory", tmp_path, monkeypatch))
    assert len(saved) > 200
    assert again == saved


@pytest.mark.slow
def test_the_notebook_on_a_real_model_runs_with_a_tiny_one(tmp_path, monkeypatch, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tiny")
    new_model(NewModel(shape="nano"), tokenizer).save_pretrained(tmp_path / "tiny")
    # A relative path, as a reader has it; PYTHONPATH, because the kernel is another process.
    monkeypatch.setenv("BFPO_NOTEBOOK_MODEL", "tiny")
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    text = printed(execute("real_model", tmp_path, monkeypatch))
    assert "14 pairs" in text
    assert re.search(r"after: \d of 4 answers are refusals", text)
    assert (tmp_path / "runs/notebook/aligned/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_notebook_on_a_real_model_was_saved_from_smollm2():
    # A run with the weights takes minutes, so it is the saved one that is checked.
    text = printed(nbformat.read(ROOT / "docs/notebooks/real_model.ipynb", as_version=4))
    assert "SmolLM2-135M-Instruct" in text
    assert "134,515,008 parameters" in text
