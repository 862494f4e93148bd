"""A name leads to one defense: found by listing, never taken twice, and to blame when its file fails."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
from torch import nn

import bench
from bench import data as datasets
from bench import registry
from bench.defense import Defense, FunctionDefense
from bench.errors import DuplicateName, PluginError, UnknownName, UsageError

ROOT = Path(__file__).parent.parent
MODEL = "    from torch import nn\n    return nn.Linear(1, 1)\n"


def function(name, doc="A model."):
    return f'import bench\n@bench.register("{name}")\ndef build(data):\n    """{doc}"""\n{MODEL}'


@pytest.fixture
def plugin(tmp_path):
    def write(content, name="my_defense.py"):
        file = tmp_path / name
        file.write_text(content)
        return file

    return write


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages in place of `defenses` and `baselines`, with these files."""

    def write(**files):
        for name, content in files.items():
            package, stem = name.split("__")
            folder = tmp_path / f"made_up_{package}"
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
            (folder / f"{stem}.py").write_text(content)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(registry, "PACKAGES", ("made_up_a", "made_up_b"))
        monkeypatch.setattr(registry, "_registered", {})

    return write


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Entry points, and the modules they are in."""

    def add(name, value, content=None):
        if content is not None:
            (tmp_path / f"{value.split(':')[0]}.py").write_text(content)
            monkeypatch.syspath_prepend(str(tmp_path))
        point = importlib.metadata.EntryPoint(name, value, registry.ENTRY_POINTS)
        points = importlib.metadata.EntryPoints(
            [*importlib.metadata.entry_points(group="bench.defenses"), point]
        )
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)

    return add


# --- listing


def test_every_file_of_defenses_and_baselines_that_registers_a_name_is_listed():
    registering = [
        f"{package}.{file.stem}"
        for package in ("defenses", "baselines")
        for file in sorted((ROOT / package).glob("*.py"))
        if "\n@register(" in file.read_text()
    ]
    assert {entry.module for entry in registry.entries().values()} == set(registering)


def test_a_file_in_a_package_is_found_without_being_imported(packages):
    packages(a__first="raise SystemExit\n" + function("first"), b__second=function("second", "Two."))
    entries = registry.entries()
    assert list(entries) == ["first", "second"]
    assert entries["second"] == registry.Entry("second", "Two.", "made_up_b.second")
    assert not any(name.startswith("made_up_") and "." in name for name in sys.modules)


def test_a_file_whose_name_begins_with_an_underscore_is_not_listed(packages):
    packages(a___draft=function("draft"), a__first=function("first"))
    assert list(registry.entries()) == ["first"]


def test_a_summary_is_the_first_line_of_the_docstring_or_else_of_the_file(packages):
    packages(a__first='"""A file."""\nimport bench\n@bench.register("first")\ndef f(data): ...\n')
    assert registry.entries()["first"].summary == "A file."


def test_a_file_is_imported_when_its_name_is_asked_for(packages):
    packages(a__first=function("first"), a__second="raise RuntimeError\n" + function("second"))
    assert issubclass(registry.get("first"), FunctionDefense)


@pytest.mark.parametrize("name", [name for name in registry.entries() if not name.endswith(":")])
def test_every_listed_name_is_a_defense_with_recipes(name):
    kind = registry.get(name)
    assert issubclass(kind, Defense) and {"tiny", "fast", "paper"} <= set(kind.recipes)


@pytest.mark.parametrize("broken", ["def f(:\n", "x = 'no end\n", "\0"])
def test_a_file_that_is_not_python_is_named(packages, broken):
    packages(a__first=function("first"), a__wrong=broken)
    with pytest.raises(PluginError, match=r"wrong\.py raises \w+: "):
        registry.entries()


def test_a_file_of_ours_that_fails_at_import_is_named_with_the_line_and_keeps_nothing(packages):
    packages(a__first=function("first") + "import not_there_at_all\n")
    for _ in range(2):
        with pytest.raises(
            PluginError, match=r"'first': module made_up_a.first, line 7, raises ModuleNotFoundError"
        ):
            registry.get("first")


def test_a_file_that_does_not_register_what_it_says_is_named(packages):
    packages(a__first="def register(name): return lambda f: f\n@register('first')\ndef f(data): ...\n")
    with pytest.raises(PluginError, match="made_up_a.first does not register 'first'"):
        registry.get("first")


# --- names


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownName, match="no defense named 'resnet81'; did you mean 'resnet18'?"):
        registry.get("resnet81")


def test_an_unknown_name_that_is_near_to_none_says_what_there_is():
    with pytest.raises(UnknownName, match="known: .*dwf.*resnet18"):
        registry.get("zzzzzzzzzz")


def test_a_name_of_a_plugin_is_suggested_too(plugin):
    registry.load_plugin(plugin(function("hedgehog")))
    with pytest.raises(UnknownName, match="did you mean 'hedgehog'?"):
        registry.get("hedgehgo")


@pytest.mark.parametrize("name", ["", "a,b", "a b", "timm:x", "../up", "é", "-x", "a/b", ":"])
def test_a_name_that_could_not_be_asked_for_is_refused(name):
    with pytest.raises(UsageError, match="cannot be a name"):
        bench.register(name)


def test_register_without_its_parentheses_says_how_it_is_written():
    with pytest.raises(UsageError, match=r'write @bench.register\("mine"\)'):
        bench.register(lambda data: nn.Linear(1, 1))


# --- what can be registered


def test_a_function_is_a_defense_with_nothing_to_train():
    @bench.register("mine")
    def build(data):
        """Mine, in one line.

        And more.
        """
        return nn.Linear(len(data.classes), 1)

    data, kind = datasets.load("digits"), registry.get("mine")
    defense = kind(kind.recipes["tiny"])
    assert defense.build(data).in_features == 10 and defense.stages(data) == ()
    assert registry.entries()["mine"].summary == "Mine, in one line."


def test_a_class_is_registered_as_it_is():
    @bench.register("mine")
    class Mine(Defense):
        """Mine."""

    assert registry.get("mine") is Mine


@pytest.mark.parametrize("thing", [3, None, nn.Linear(1, 1)], ids=["number", "nothing", "network"])
def test_what_is_neither_class_nor_function_is_refused(thing):
    bench.register("mine")(thing)
    with pytest.raises(
        UsageError, match=f"'mine' is a {type(thing).__name__}; register a Defense subclass or a function"
    ):
        registry.get("mine")


# --- duplicates


def test_a_name_is_not_registered_twice():
    bench.register("mine")(lambda data: nn.Linear(1, 1))
    with pytest.raises(DuplicateName, match=f"'mine' is registered by {__name__} already"):
        bench.register("mine")(lambda data: nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["dwf", "resnet18", "timm:"])
def test_a_name_of_ours_is_not_taken_even_before_its_file_is_imported(name):
    with pytest.raises(DuplicateName, match=rf"'{name}' is registered by (defenses|baselines)\.\w+ already"):
        bench.register(name)(lambda data: nn.Linear(1, 1))
    assert name not in registry._registered or registry._registered[name].owner != __name__


def test_two_files_do_not_claim_one_name(packages):
    packages(a__first=function("same"), b__second=function("same"))
    with pytest.raises(
        DuplicateName, match="'same' is registered by made_up_a.first and by made_up_b.second; rename one"
    ):
        registry.entries()


def test_an_installed_package_does_not_claim_a_name_of_ours(installed):
    installed("dwf", "made_up_package:Theirs")
    with pytest.raises(
        DuplicateName,
        match=r"'dwf' is registered by defenses.dwf and by the installed made_up_package:Theirs",
    ):
        registry.entries()


def test_two_installed_packages_do_not_claim_one_name(installed):
    installed("theirs", "made_up_one:f")
    installed("theirs", "made_up_two:f")
    with pytest.raises(
        DuplicateName, match="'theirs' is registered by made_up_one:f and by the installed made_up_two:f"
    ):
        registry.entries()


# --- entry points


def test_an_installed_defense_is_listed_and_loaded_when_asked_for(installed):
    installed("theirs", "made_up_theirs:build", f"def build(data):\n{MODEL}")
    assert registry.entries()["theirs"].summary == "from made_up_theirs:build"
    assert "made_up_theirs" not in sys.modules
    assert issubclass(registry.get("theirs"), FunctionDefense)


@pytest.mark.parametrize("value", ["made_up_theirs:build", "made_up_theirs"])
def test_an_installed_defense_may_be_decorated_too(installed, value):
    installed("theirs", value, function("theirs"))
    assert issubclass(registry.get("theirs"), FunctionDefense)


def test_a_plugin_does_not_take_the_name_of_an_installed_defense(installed, plugin):
    installed("theirs", "made_up_theirs:build", f"def build(data):\n{MODEL}")
    with pytest.raises(DuplicateName, match="'theirs' is registered by made_up_theirs:build already"):
        registry.load_plugin(plugin(function("theirs")))


def test_an_installed_defense_that_fails_is_named_with_its_line(installed):
    installed("theirs", "made_up_theirs:build", "\n\n1 / 0\n")
    with pytest.raises(
        PluginError, match="'theirs': module made_up_theirs, line 3, raises ZeroDivisionError"
    ):
        registry.get("theirs")


def test_an_entry_point_to_nothing_is_named(installed):
    installed("theirs", "made_up_theirs:build", "")
    with pytest.raises(PluginError, match="'theirs': .*raises AttributeError.*build"):
        registry.get("theirs")


# --- families


def test_a_family_is_given_the_rest_of_the_name():
    made = []

    @bench.register("zoo:")
    def family(rest):
        made.append(rest)
        return type(rest, (Defense,), {})

    assert registry.get("zoo:some/animal:1").__name__ == "some/animal:1"
    assert made == ["some/animal:1"]


def test_a_familys_prefix_alone_is_no_name():
    with pytest.raises(UsageError, match="'timm:' stands for many; add which one: timm:NAME"):
        registry.get("timm:")


def test_a_name_that_a_family_does_not_have_suggests_the_nearest():
    with pytest.raises(UsageError, match="timm has no model named 'resnet81'; did you mean 'timm:resnet"):
        registry.get("timm:resnet81")


# --- MODULE:FUNCTION


def test_a_function_is_found_in_any_module():
    kind = registry.get("torchvision.models:resnet18")
    assert issubclass(kind, FunctionDefense) and kind.__name__ == "torchvision.models:resnet18"


def test_a_module_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "made_up_here.py").write_text(f"def build(data):\n{MODEL}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    kind = registry.get("made_up_here:build")
    assert isinstance(kind(None).build(None), nn.Linear)


def test_a_module_that_is_not_there_is_named_beside_the_families():
    with pytest.raises(UsageError, match=r"no module named 'tim' for the defense 'tim:resnet18'.*timm:NAME"):
        registry.get("tim:resnet18")


def test_a_function_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="module 'torchvision.models' has no 'resnet81'"):
        registry.get("torchvision.models:resnet81")


@pytest.mark.parametrize("name", [":f", ".a:f", "a..b:f", "a/b:f", "os:"])
def test_what_cannot_be_a_module_and_a_function_is_refused(name):
    with pytest.raises(UsageError, match="is not MODULE:FUNCTION"):
        registry.get(name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("\n1 / 0\n", "line 2, raises ZeroDivisionError"),
        ("\nimport made_up_not_there\n", "line 2, raises ModuleNotFound"),
    ],
)
def test_a_module_that_fails_is_named_with_its_line(tmp_path, monkeypatch, content, said):
    (tmp_path / "made_up_failing.py").write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match=f"'made_up_failing:f': module made_up_failing, {said}"):
        registry.get("made_up_failing:f")


# --- plugins


def test_a_plugin_registers_names(plugin):
    registry.load_plugin(plugin(function("mine", "From a file.")))
    assert registry.entries()["mine"].summary == "From a file."
    assert issubclass(registry.get("mine"), FunctionDefense)


def test_a_plugin_is_run_once_however_it_is_named(plugin, tmp_path, monkeypatch):
    file = plugin(function("mine"))
    (tmp_path / "link.py").symlink_to(file)
    monkeypatch.chdir(tmp_path)
    for path in (
        file,
        str(file),
        "my_defense.py",
        "../" + tmp_path.name + "/my_defense.py",
        tmp_path / "link.py",
    ):
        registry.load_plugin(path)
    assert len([m for m in sys.modules if m.startswith("bench_plugin_")]) == 1


def test_a_copy_of_a_plugin_is_another_plugin(plugin):
    first = plugin(function("mine"))
    registry.load_plugin(first)
    with pytest.raises(DuplicateName, match=f"'mine' is registered by {first} already"):
        registry.load_plugin(plugin(function("mine"), "copy.py"))


def test_a_plugin_that_takes_a_name_of_ours_is_refused_and_keeps_nothing(plugin):
    with pytest.raises(DuplicateName, match=r"'dwf' is registered by defenses.dwf already"):
        registry.load_plugin(plugin(function("mine") + function("dwf")))
    assert "mine" not in registry.entries()


def test_a_plugin_that_registers_one_name_twice_is_refused(plugin):
    file = plugin(function("mine") * 2)
    with pytest.raises(DuplicateName, match=f"'mine' is registered by {file} already"):
        registry.load_plugin(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("\n\nraise ValueError('of\\nno use')\n", "line 3, raises ValueError: of no use$"),
        ("import made_up_nowhere\n", "line 1, raises ModuleNotFoundError: No module named 'made_up_nowhere'"),
        ("x = 1\nx = = 2\n", r" raises SyntaxError: .*\(my_defense.py, line 2\)"),
        ("raise SystemExit(3)\n", "line 1, raises SystemExit: 3"),
        ("def f():\n    return [][0]\nf()\n", "line 2, raises IndexError"),
        ("import bench\nbench.register('a,b')\n", "line 2, raises UsageError: 'a,b' cannot be a name"),
        ("\0", "raises (SyntaxError|ValueError): .*null bytes"),
    ],
)
def test_a_plugin_that_fails_is_named_with_the_line(plugin, content, said):
    with pytest.raises(PluginError, match=f"^plugin my_defense.py,? ?{said}"):
        registry.load_plugin(plugin(content))


def test_a_plugin_that_fails_keeps_nothing_and_may_be_mended(plugin):
    with pytest.raises(PluginError, match="line 7, raises ZeroDivisionError"):
        registry.load_plugin(plugin(function("mine") + "1 / 0\n"))
    assert "mine" not in registry.entries()
    assert not [module for module in sys.modules if module.startswith("bench_plugin_")]
    registry.load_plugin(plugin(function("mine")))
    assert "mine" in registry.entries()


def test_what_a_failing_plugin_imported_stays_registered(packages, plugin):
    packages(a__first=function("first"))
    with pytest.raises(PluginError):
        registry.load_plugin(plugin("import made_up_a.first\n1 / 0\n"))
    assert issubclass(registry.get("first"), FunctionDefense)


def test_an_edited_plugin_replaces_itself(plugin):
    registry.load_plugin(plugin(function("mine", "Old.") + function("gone")))
    # of the same length and within the same second, so that neither size nor time shows the edit
    registry.load_plugin(plugin(function("mine", "New.") + function("come")))
    entries = registry.entries()
    assert entries["mine"].summary == "New." and "gone" not in entries and "come" in entries
    assert registry.get("mine").__doc__ == "New."


def test_a_plugin_may_import_its_neighbours(plugin, tmp_path):
    plugin("SUMMARY = 'From next door.'\n", "made_up_neighbour.py")
    registry.load_plugin(plugin("from made_up_neighbour import SUMMARY\n" + function("mine")))
    assert "mine" in registry.entries()


@pytest.mark.parametrize("make", ["folder", "text", None])
def test_a_plugin_must_be_a_python_file(tmp_path, make):
    file = tmp_path / ("plugin.txt" if make == "text" else "plugin.py")
    if make == "folder":
        file.mkdir()
    elif make == "text":
        file.write_text(function("mine"))
    with pytest.raises(
        PluginError, match="no plugin file .*plugin.py|is not a Python file; plugins end in .py"
    ):
        registry.load_plugin(file)


@pytest.mark.parametrize("interactive", [True, False])
def test_a_cell_of_a_notebook_may_be_run_again_and_a_program_may_not_name_twice(monkeypatch, interactive):
    monkeypatch.setattr(registry, "_registered", {})
    if interactive:
        monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    else:
        monkeypatch.delattr(sys, "ps1", raising=False)
    cell = "from bench.registry import register\n@register('again')\ndef again(data): ...\n"
    first, second = {"__name__": "__main__"}, {"__name__": "__main__"}
    exec(cell, first)
    if interactive:
        exec(cell, second)
        assert registry._registered["again"].thing is second["again"]
    else:
        with pytest.raises(DuplicateName, match="'again' is registered by __main__"):
            exec(cell, second)
