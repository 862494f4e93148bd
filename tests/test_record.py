"""A run is found by as little of its path as tells it from others."""

import pytest
from made_up import run

from bench.errors import UsageError
from bench.record import find


@pytest.fixture
def results(tmp_path):
    """The same two protocols on two defenses, and a name within a name."""
    for defense in ("dwf", "resnet18"):
        run(tmp_path, defense=defense)
    run(tmp_path, defense="resnet18", protocol="standard")
    run(tmp_path, defense="resnet18", protocol="standard-l2")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("dwf", "dwf/dwf-paper"),
        ("digits/dwf", "dwf/dwf-paper"),
        ("dwf/", "dwf/dwf-paper"),
        ("dwf/dwf-paper", "dwf/dwf-paper"),
        ("standard", "resnet18/standard"),
        ("standard-l", "resnet18/standard-l2"),
        ("18/dwf", "resnet18/dwf-paper"),
    ],
)
def test_a_whole_name_goes_before_a_part_of_one(results, given, found):
    defense, protocol = found.split("/")
    folder = find(results, given)
    assert (folder.parent.name, folder.name.rpartition("-")[0]) == (defense, protocol)


def test_a_key_alone_is_enough(results):
    folder = find(results, "dwf")
    assert find(results, folder.name.rpartition("-")[2]) == folder
    assert find(results, folder.name.rpartition("-")[2][:8]) == folder


def test_runs_that_fit_equally_well_are_named_and_no_others(results):
    with pytest.raises(UsageError, match="several runs fit 'resnet18'") as said:
        find(results, "resnet18")
    assert str(said.value).count("digits/resnet18/") == 3 and "digits/dwf/" not in str(said.value)


def test_a_name_that_is_mistyped_suggests_the_nearest(results):
    with pytest.raises(UsageError, match="no run fits 'resnet81'.*did you mean 'resnet18'"):
        find(results, "resnet81")
