"""The page as HTML: every number from a group, nothing fetched, nothing that a record says becomes markup."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner
from made_up import found, paper_columns, run

from bench import published, report
from bench.cli import commands
from bench.errors import UsageError
from bench.long import groups
from bench.record import Asked, ColumnRecord, Facts, folder, read_all, void

VOID_ELEMENTS = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """Elements with their attributes and text, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, **dict(attrs), "text": "", "inside": [e["tag"] for e in self.open]}
        self.elements.append(element)
        if tag not in VOID_ELEMENTS:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        named = {name.replace("_", "-"): value for name, value in attributes.items()}
        return [
            e
            for e in self.elements
            if e["tag"] == tag and all(e.get(name) == value for name, value in named.items())
        ]

    def rows(self):
        return [e for e in self.all("tr") if "data-anchor" in e]


@pytest.fixture(autouse=True)
def without_vega(monkeypatch):
    monkeypatch.setattr(report, "_vega", lambda: "")


def page(results) -> Page:
    return Page(report.render(results))


def percents(text):
    return [float(number) for number in re.findall(r"\d+\.\d\d", text)]


def test_a_row_says_what_its_group_measured(tmp_path):
    run(tmp_path, {"clean": 190, "fgsm-0.05": 111, "a-pgd-100": 87})
    (group,) = groups(read_all(tmp_path))
    shown = page(tmp_path)
    (row,) = shown.rows()
    assert float(row["data-worst"]) == group.column("worst-case").accuracy == 43.5
    (headline,) = shown.all("td", data_title="Worst case")
    (clean,) = shown.all("td", data_title="Clean")
    assert (percents(headline["text"]), percents(clean["text"])) == ([43.5], [95.0])
    worst = group.column("worst-case")
    assert f"[{worst.ci_low:.1f}, {worst.ci_high:.1f}]" in headline["text"]


def test_every_column_is_shown_with_its_number(tmp_path):
    run(tmp_path, {f"fgsm-0.0{i}": 200 - 7 * i for i in range(1, 10)})
    (group,) = groups(read_all(tmp_path))
    text = next(
        e["text"] for e in page(tmp_path).all("table") if "Every" in e["text"] or "fgsm-0.01" in e["text"]
    )
    for column in group.columns:
        assert f"{column.name}{column.accuracy:.2f} [" in text


def test_curves_hold_the_points_of_the_group(tmp_path):
    run(tmp_path, {f"fgsm-0.0{i}": 200 - 7 * i for i in range(1, 10)})
    (group,) = groups(read_all(tmp_path))
    charts = [json.loads(e["data-chart"]) for e in page(tmp_path).all("figure") if "data-chart" in e]
    assert [chart["axis"] for chart in charts] == ["FGSM radius eps", "PGD steps"]
    points = {point["x"]: point for point in charts[0]["values"]}
    measured = group.column("fgsm-0.03")
    assert points[0.03]["y"] == measured.accuracy == 89.5
    assert points[0.03]["low"] == round(measured.ci_low, 3)


def test_several_seeds_show_their_deviation(tmp_path):
    for seed, held in enumerate((100, 110, 120)):
        run(tmp_path, {"a-pgd-100": held}, seed=seed)
    (headline,) = page(tmp_path).all("td", data_title="Worst case")
    assert percents(headline["text"]) == [55.0, 5.0]
    assert "±" in headline["text"]


def test_what_a_record_says_never_becomes_markup(tmp_path):
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    run(tmp_path, defense=evil, dataset=evil, findings=[found(evil)], footnotes=[evil])
    shown = page(tmp_path)
    assert len(shown.all("script")) == 2
    assert not shown.all("img")
    (row,) = shown.rows()
    assert row["data-label"] == row["data-dataset"] == evil
    assert evil in next(e["text"] for e in shown.all("details") if e.get("class") == "badge warns")


def test_nothing_is_fetched(tmp_path):
    run(tmp_path)
    shown = page(tmp_path)
    pointing = [e[name] for e in shown.elements for name in ("src", "href", "action", "poster") if name in e]
    assert pointing
    assert all(target.startswith(("#", "data:,")) for target in pointing)
    (style,) = shown.all("style")
    assert not re.search(r"url\(|@import", style["text"])
    (policy,) = shown.all("meta", http_equiv="Content-Security-Policy")
    assert "default-src 'none'" in policy["content"]


def test_a_suspect_row_is_marked_and_explained(tmp_path):
    run(tmp_path, findings=[found("gradients vanish on 80 images")])
    shown = page(tmp_path)
    assert shown.rows()[0]["class"] == "suspect"
    (badge,) = shown.all("details", **{"class": "badge warns"})
    assert badge["text"] == "zero-gradientgradients vanish on 80 images. look again."


def test_a_void_run_shows_no_number(tmp_path):
    run(tmp_path, {"a-pgd-100": 87}, findings=[found("NaN", severity="blocks")])
    shown = page(tmp_path)
    (row,) = shown.rows()
    assert row["class"] == "void"
    assert row["data-worst"] == row["data-clean"] == ""
    numbers = [e["text"] for e in shown.all("td") if (e.get("class") or "").startswith("number")]
    assert len(numbers) > 17
    assert not percents("".join(numbers))


def test_a_void_run_without_a_record_is_listed(tmp_path):
    asked = Asked(
        dataset="digits",
        data_hash="d",
        defense="broken",
        config={},
        recipe=None,
        model_hash="m",
        protocol={"name": "quick"},
        seed=0,
        samples=1,
    )
    void(folder(tmp_path, asked), asked, [found("image 3: NaN", severity="blocks", code="non-finite")])
    (row,) = page(tmp_path).rows()
    assert (row["data-label"], row["data-verdict"], row["data-worst"]) == ("broken", "void", "")


def test_a_suspect_row_stands_below_a_credible_one(tmp_path):
    run(tmp_path, {"a-pgd-100": 190}, defense="doubted", findings=[found("x")])
    run(tmp_path, {"a-pgd-100": 90}, defense="honest")
    assert [row["data-label"] for row in page(tmp_path).rows()] == ["honest", "doubted"]


def test_the_deciding_attack_alone_leaves_the_worst_case(tmp_path):
    run(tmp_path, {"pgd-20": 120, "ms-pgd-100": 80})
    assert page(tmp_path).rows()[0]["data-decided"] == "ms-pgd-100"


def test_attacks_that_decide_together_are_said_to(tmp_path):
    columns = paper_columns()[:3]
    first, last = [i >= 50 for i in range(100)], [i < 60 for i in range(100)]
    run(tmp_path, {"fgsm-0.01": first, "fgsm-0.02": last}, columns=columns, n=100)
    (row,) = page(tmp_path).rows()
    assert float(row["data-worst"]) == 10
    assert row["data-decided"] == "fgsm-0.01 (50.00 % alone), with others"


def test_a_diagnostic_decides_nothing(tmp_path):
    columns = [*paper_columns()[:2], ColumnRecord(name="bound", attack="every-expert", diagnostic=True)]
    run(tmp_path, {"fgsm-0.01": 150, "bound": 10}, columns=columns)
    (made,) = report.entries(tmp_path)
    assert made.decided == "fgsm-0.01"
    assert [(line.column, line.images) for line in made.falls.lines] == [("fgsm-0.01", 50)]


def test_what_the_paper_prints_stands_beside(tmp_path):
    run(tmp_path, dataset="cifar10", published_as="DWF")
    printed = published.rows("cifar10")["DWF"]
    lowest = min(one.accuracy for (attack, _), one in printed.items() if attack != "clean")
    (cell,) = page(tmp_path).all("td", data_title="Published")
    assert f"clean: {printed['clean', 0.0].accuracy:.2f}" in cell["text"]
    assert f": {lowest:.2f}" in cell["text"]


def test_gate_usage_that_no_record_holds_is_not_invented(tmp_path):
    run(tmp_path, model=Facts(mixture="soft"))
    run(tmp_path, defense="plain")
    sections = {e["id"]: e["text"] for e in page(tmp_path).all("details") if "id" in e}
    assert ["do not hold which expert" in text for text in sections.values()] == [True, False]


def test_every_number_names_its_record(tmp_path):
    record = run(tmp_path)
    (section,) = [e for e in page(tmp_path).all("details") if "id" in e]
    where = record._folder.relative_to(tmp_path).as_posix()
    assert f"{where}/record.json" in section["text"]
    assert record.outcomes_sha256[:12] in section["text"]


def test_every_link_leads_to_one_place(tmp_path):
    for defense in ("a", "b"):
        run(tmp_path, defense=defense)
    shown = page(tmp_path)
    ids = [e["id"] for e in shown.elements if "id" in e]
    assert len(ids) == len(set(ids))
    assert {e["href"] for e in shown.all("a")} <= {f"#{one}" for one in ids}


def test_equal_records_give_equal_pages(tmp_path):
    run(tmp_path, {"a-pgd-100": 87})
    assert report.render(tmp_path) == report.render(tmp_path)


def test_it_says_what_is_wrong_with_the_places_it_is_given(tmp_path):
    with pytest.raises(UsageError, match="no results folder"):
        report.write(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no finished runs"):
        report.write(tmp_path)
    run(tmp_path)
    with pytest.raises(UsageError, match="is a folder"):
        report.write(tmp_path, tmp_path)
    assert report.write(tmp_path) == tmp_path / "report.html"


def test_the_command_writes_the_file_and_says_where(tmp_path):
    run(tmp_path / "results")
    out = tmp_path / "page.html"
    done = CliRunner().invoke(commands, ["report", "--results", str(tmp_path / "results"), "--out", str(out)])
    assert done.output == f"{out}\n"
    assert out.read_text(encoding="utf-8").rstrip().endswith("</html>")


def test_it_needs_no_torch(tmp_path):
    run(tmp_path)
    code = (
        "import sys; from pathlib import Path; from bench import report; report._vega = str; "
        f"report.render(Path({str(tmp_path)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
