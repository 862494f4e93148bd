"""Every command, program and protocol in the pages of docs/ is tried: read by the parser here, run in the slow tests."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from bench.cli import commands
from bench.protocol import Protocol, tomllib

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
README = ROOT / "README.md"
BLOCK = re.compile(r'^```(\w*)(?: title="(.+?)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
#: as many images as are attacked when a page is tried
SAMPLES = "40"


class Block(NamedTuple):
    language: str
    title: str
    text: str


def blocks(page):
    return [Block(*found) for found in BLOCK.findall(page.read_text(encoding="utf-8"))]


def commands_in(block):
    """The words after `bench` of each command, started by torchrun or not; what follows `#`, `>` or `|` is not its own."""
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True) if re.match(r"bench\b|torchrun\b", line) else []
        if words[:1] == ["torchrun"]:
            words = words[words.index("-m") + 1 :]
        for stop in (">", "|"):
            words = words[: words.index(stop)] if stop in words else words
        if words:
            yield words[1:]


def parse(words):
    """Has click read a command as it would be read, and does not run it."""
    with commands.make_context("bench", list(words)) as context:
        if words:
            name, command, rest = commands.resolve_command(context, list(words))
            command.make_context(name, rest, parent=context)


ALL = [
    pytest.param(words, id=f"{page.relative_to(ROOT)}: {' '.join(words)}")
    for page in [*PAGES, README]
    for block in blocks(page)
    for words in commands_in(block)
]


@pytest.mark.parametrize("words", ALL)
def test_a_command_is_one_that_bench_understands(words):
    parse(words)


def test_a_command_that_is_none_would_be_found():
    block = Block(
        "bash", "", "bench run  # fine\nbench rum\ntorchrun --nnodes 2 -m bench run --sampels 3\npip x\n"
    )
    fine, *wrong = commands_in(block)
    parse(fine)
    for words in wrong:
        with pytest.raises(Exception, match="No such"):
            parse(words)
    assert len(wrong) == 2


def test_the_pages_are_found_with_their_commands():
    assert len(PAGES) >= 14 and len(ALL) >= 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_programs_compile_and_protocols_are_valid(page):
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, f"{page.name}: {block.title}", "exec")
        if block.language == "toml":
            assert Protocol.model_validate(tomllib.loads(block.text)).columns(0.1)


def test_a_page_shows_the_defense_of_the_readme():
    def code(page):
        (text,) = [block.text for block in blocks(page) if "class Mine(" in block.text]
        return re.sub(r'""".*?"""', "", re.sub(r"\s+", "", text), flags=re.DOTALL).replace(",)", ")")

    assert code(ROOT / "docs" / "howto-defense.md") == code(README)


# --- run, on few images


def shrunk(words):
    """A command on fewer images."""
    if words[:1] != ["run"]:
        return words
    kept = list(words)
    if "--samples" in kept:
        at = kept.index("--samples")
        del kept[at : at + 2]
    return [*kept, "--samples", SAMPLES, "--quiet", "--yes"]


def bench(words, place):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, *words]
    done = subprocess.run(program, capture_output=True, text=True, cwd=place, env=environment, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of trainings that pages share, and somebody's checkpoint."""
    import torch
    from safetensors.torch import load_file

    place = tmp_path_factory.mktemp("trained")
    bench(["-m", "bench", "train", "--defense", "resnet18", "--quiet"], place)
    (file,) = place.rglob("model.safetensors")
    torch.save(load_file(file), place / "theirs.pt")
    return place


@pytest.fixture
def with_trainings(trained, tmp_path):
    """Lends a page the trainings of those before it, and takes what it trained: hard links, since links out are refused."""

    def linked(source, target):
        shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True)

    ours, kept = (place / "results" / "checkpoints" for place in (tmp_path, trained))
    linked(kept, ours)
    yield
    linked(ours, kept)


def _link(source, target):
    Path(target).unlink(missing_ok=True)
    os.link(source, target)


@pytest.mark.slow
@pytest.mark.usefixtures("with_trainings")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_everything_on_a_page_runs(page, trained, tmp_path):
    shutil.copy(trained / "theirs.pt", tmp_path)
    for block in blocks(page):
        if block.title:
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            bench(["-c", block.text], tmp_path)
        elif "torchrun" not in block.text:
            for words in commands_in(block):
                bench(["-m", "bench", *shrunk(words)], tmp_path)
