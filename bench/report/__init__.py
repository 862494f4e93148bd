"""Records to one HTML page that stands alone: no network, no server; it opens from a mail attachment.

Data flows one way: records, groups, entries (`bench.report.entry`), the page. The statistics are those of tables and
figures. The page reads without scripts; with them it sorts, filters and draws, by Vega, whose code is inlined.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path

from bench import __version__, registry
from bench.errors import UsageError
from bench.long import groups
from bench.record import atomic, read_all, read_void
from bench.report.entry import Entry, entry, void_entry


def write(results: Path, out: Path | None = None) -> Path:
    """Writes the page, by default as `report.html` in the results folder; where it lies.

    Raises:
        UsageError: no such folder, nothing in it, something damaged, or a place that cannot be written.
    """
    path = out or results / "report.html"
    if path.is_dir():
        raise UsageError(
            f"{str(path)!r} is a folder; give the name of a file, such as {path / 'report.html'}"
        )
    atomic(path, render(results).encode())
    return path


def render(results: Path) -> str:
    """The page of a results folder, as HTML.

    Raises:
        UsageError: no such folder, nothing in it, or something in it is damaged.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    found = entries(results)
    if not found:
        raise UsageError(f"no finished runs in {str(results)!r}; `bench run` makes some")
    environment = Environment(
        loader=PackageLoader("bench", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own = files("bench.report")
    return environment.get_template("page.html").render(
        entries=found,
        version=__version__,
        # files of ours and of Vega's alone: nothing that a record says goes past the escape
        style=Markup(own.joinpath("page.css").read_text(encoding="utf-8")),
        script=Markup(own.joinpath("page.js").read_text(encoding="utf-8")),
        vega=Markup(_vega()),
    )


def entries(results: Path) -> list[Entry]:
    """The groups of a results folder and its void runs, credible ones first, by dataset, protocol and worst case."""
    known = registry.entries()
    made = [
        *(
            entry(group, f"run-{place}", results, known)
            for place, group in enumerate(groups(read_all(results)))
        ),
        *_voids(results),
    ]
    return sorted(made, key=_place)


def _place(one: Entry) -> tuple[str, str, bool, float]:
    return one.dataset, one.protocol, one.verdict != "credible", -(one.worst.accuracy if one.worst else 0.0)


def _voids(results: Path) -> Iterator[Entry]:
    for place, file in enumerate(sorted((results / "runs").glob("*/*/*/void.json"))):
        void = read_void(file.parent)
        if void is not None and not (file.parent / "record.json").exists():
            yield void_entry(file.parent.relative_to(results).as_posix(), void, f"void-{place}")


@cache
def _vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script that puts `vegaEmbed` into the window."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
