"""LaTeX that the harness writes is set by a real TeX, as it is."""

import re
import shutil
import subprocess

import pypdf
import pytest
from made_up import found, paper_columns, run

from bench import catalogue, sheet
from bench.table import Look, render
from bench.typeset import document

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("pdflatex") is None,
        reason="pdflatex is not installed: Debian has it in texlive-latex-base and texlive-latex-recommended",
    ),
]

#: what a paper of two columns has, and what the first line of each table asks for
PAPER = "\\documentclass[twocolumn]{article}\n\\usepackage{booktabs}\n\\usepackage{graphicx}\n\\begin{document}\n%s\n\\end{document}\n"


def typeset(folder, text):
    """The words that pdflatex sets, twice run so that references are settled; it must find no error and no unknown letter."""
    (folder / "table.tex").write_text(text, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"]
    for _ in range(2):
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120)
    log = (folder / "table.log").read_text(encoding="latin-1")
    assert done.returncode == 0, log[-2000:]
    assert "LaTeX Warning: Reference" not in log and "multiply defined" not in log
    assert not re.search(r"Overfull \\hbox \((\d{2,})", log)
    pages = pypdf.PdfReader(folder / "table.pdf").pages
    return "\n".join(page.extract_text() for page in pages)


@pytest.fixture
def results(tmp_path):
    """Rows with everything that LaTeX might stumble over."""
    held = {column.name: 200 - 10 * i for i, column in enumerate(paper_columns())}
    run(tmp_path / "r", held, dataset="cifar10")
    run(tmp_path / "r", held, dataset="cifar10", seed=1)
    worse = {name: count // 2 for name, count in held.items()}
    said = [found("50 % of them, a_b & c #1 ~ ‖x‖∞ ≤ 8/255, –α → β", code="odd-one")]
    run(tmp_path / "r", worse, dataset="cifar10", defense="fgsm_at", findings=said, footnotes=["[a] µ: --x"])
    run(tmp_path / "r", worse, dataset="cifar10", defense="soe", published_as="SoE")
    return tmp_path / "r"


@pytest.mark.parametrize(
    "asked",
    [
        {"published": True},
        {"compare_to": "soe", "look": Look(ci=True, columns=("SA", "pgd"))},
        {"cost": True},
        {"per_class": True},
        {"look": Look(transpose=True)},
    ],
)
def test_tables_of_results_are_set_in_a_paper_of_two_columns_and_alone(asked, results, tmp_path):
    text = render(results, format="latex", **asked)
    words = typeset(tmp_path, PAPER % text)
    assert "fgsm" in words and "odd-one" in words
    assert typeset(tmp_path, document(text))


def test_the_long_table_is_set_alone(results, tmp_path):
    assert "fgsm" in typeset(tmp_path, document(render(results, format="latex", layout="long")))


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (lambda: catalogue.taxonomy(beside=True), "published"),
        (lambda: sheet.transposed(catalogue.taxonomy()), "activation"),
        (catalogue.attacks, "8/255"),
        (lambda: catalogue.recipes("paper"), "end to end"),
    ],
)
def test_the_catalogue_is_set_in_a_paper_of_two_columns_and_alone(made, word, tmp_path):
    text = sheet.written(made(), "latex")
    assert word in typeset(tmp_path, PAPER % text)
    assert word in typeset(tmp_path, document(text))
