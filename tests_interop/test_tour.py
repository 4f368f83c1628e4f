"""The notebook runs from its first cell to its last, and what it shows holds."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.get("outputs", []))


def test_the_tour(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    shown = [text_of(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert "smollm2-135m-instruct 30 layers of size 576" in shown[0]
    assert "completeness error" in shown[1] and "(30, 576)" in shown[2]
    margins = [float(line.split("pairs ")[1].split(",")[0]) for line in shown[3].splitlines()]
    assert margins == sorted(margins) and margins[-1] > margins[0] + 5
    assert "['README.md', 'grains.json', 'vectors.gguf']" in shown[-1]
