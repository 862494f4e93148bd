"""The notebook goes from a model of one's own to a table, in ten cells; here in its tiny setting."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "examples" / "own_model.ipynb"

nbformat = pytest.importorskip("nbformat")

#: runs a notebook in a process of its own: what Jupyter warns of is not ours, and its kernel must not outlive the test
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The code cells after they were run."""
    pytest.importorskip("nbclient")
    place = tmp_path_factory.mktemp("notebook")
    environment = {**os.environ, "BENCH_TINY": "1", "HOME": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, FILE, place / "done.ipynb"],
        capture_output=True,
        text=True,
        cwd=FILE.parent.parent,
        env=environment,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return code_cells(nbformat.read(place / "done.ipynb", as_version=4))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said(cell):
    return "\n".join(
        output.get("text") or output["data"].get("text/markdown") or output["data"]["text/plain"]
        for output in cell.outputs
    )


def test_it_has_ten_cells_and_no_outputs():
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert len(cells) == 10
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_it_attacks_the_model_of_its_reader(executed):
    assert "mine" in said(executed[6]) and "worst-case" in said(executed[6])


def test_it_says_what_speaks_against_the_number(executed):
    assert said(executed[7]).split()[0] in ("credible", "suspect") and "few-images" in said(executed[7])


def test_it_ends_with_a_table_of_both_compared_image_by_image(executed):
    table = said(executed[9])
    assert "| mine" in table and "| pgd_at" in table and "McNemar" in table
