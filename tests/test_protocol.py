import pydantic
import pytest

from bench import protocol as protocols
from bench.errors import ProtocolError, UnknownName
from bench.protocol import ColumnSpec, Protocol, with_attacks


def write(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def test_dwf_paper_asks_what_the_papers_table_3_shows():
    protocol = protocols.load("dwf-paper")
    columns = protocol.columns(8 / 255)
    assert protocol.success == "last"
    assert [c.attack for c in columns] == ["clean"] + ["fgsm"] * 9 + ["pgd"] * 5 + ["ms-pgd", "a-pgd"]
    assert [c.eps for c in columns[1:10]] == [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09]
    assert [c.steps for c in columns[10:15]] == [10, 20, 30, 40, 50]
    assert [(c.steps, c.restarts, c.eot) for c in columns[15:]] == [(100, 3, 1), (100, 1, 1)]
    assert {(c.eps, c.step_size) for c in columns[10:]} == {(8 / 255, 2 / 255)}


def test_what_the_paper_does_not_say_is_marked_and_footnoted():
    protocol = protocols.load("dwf-paper")
    assert protocol.provenance["eps"] == protocol.provenance["step_size"] == "unrecovered"
    assert any("does not give" in note for note in protocol.footnotes)


@pytest.mark.parametrize("name", protocols.names())
def test_every_protocol_that_comes_with_the_harness_is_valid(name):
    protocol = protocols.load(name)
    assert protocol.name == name
    columns = protocol.columns(0.1)
    assert columns[0].name == "clean" and len({c.name for c in columns}) == len(columns)


def test_a_protocol_of_ones_own_is_a_file(tmp_path):
    path = write(
        tmp_path,
        'name="mine"\neps="4/255"\nsuccess="any"\n[[column]]\nattack="pgd"\nsteps=[5,7]\nrestarts=2\nloss="margin"\n',
    )
    protocol = protocols.load(path)
    columns = protocol.columns(protocol.radius(0.1))
    assert [(c.name, c.attack) for c in columns] == [
        ("clean", "clean"),
        ("pgd-5x2-margin", "pgd-margin"),
        ("pgd-7x2-margin", "pgd-margin"),
    ]
    assert columns[1].eps == 4 / 255 and columns[1].step_size == 1 / 255


def test_an_override_beats_the_protocol_and_the_protocol_beats_the_dataset(tmp_path):
    fixed = protocols.load(write(tmp_path, 'name="mine"\neps=0.2\n[[column]]\nattack="fgsm"\n'))
    assert fixed.radius(0.1) == 0.2 and fixed.radius(0.1, 0.3) == 0.3
    assert protocols.load("dwf-paper").radius(0.1) == 0.1


FAULTS = {
    "no TOML": ("name = ", "is not TOML"),
    "no name": ('[[column]]\nattack="fgsm"\n', "name: Field required"),
    "no columns": ('name="mine"\n', "column: Field required"),
    "unknown field": (
        'name="mine"\nsucces="any"\n[[column]]\nattack="fgsm"\n',
        "line 2: succes: no such setting; did you mean 'success'",
    ),
    "unknown attack": ('name="mine"\n\n[[column]]\nattack="pdg"\nsteps=3\n', "line 4: .*did you mean 'pgd'"),
    "bad success": ('name="mine"\nsuccess="best"\n[[column]]\nattack="fgsm"\n', "line 2: success"),
    "eps 0": ('name="mine"\neps=0\n[[column]]\nattack="fgsm"\n', "line 2: eps"),
    "column eps above 1": (
        'name="mine"\n[[column]]\nattack="fgsm"\n[[column]]\nattack="fgsm"\neps=8\n',
        "line 6: .*eps",
    ),
    "no steps": ('name="mine"\n[[column]]\nattack="pgd"\n', "line 2: .*pgd needs steps"),
    "steps 0": ('name="mine"\n[[column]]\nattack="pgd"\nsteps=0\n', "line 4: .*steps"),
    "steps for fgsm": ('name="mine"\n[[column]]\nattack="fgsm"\nsteps=3\n', "fgsm has no steps"),
    "restarts without random start": (
        'name="mine"\n[[column]]\nattack="pgd"\nsteps=3\nrestarts=2\nrandom_start=false\n',
        "one run repeated",
    ),
    "bad step size": (
        'name="mine"\n[[column]]\nattack="pgd"\nsteps=3\nstep_size="eps:4"\n',
        "line 5: .*step_size",
    ),
    "name that is a path": ('name="../mine"\n[[column]]\nattack="fgsm"\n', "line 1: name"),
}


@pytest.mark.parametrize("text, message", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_with_its_line_and_field(tmp_path, text, message):
    with pytest.raises(ProtocolError, match=message) as caught:
        protocols.load(write(tmp_path, text))
    assert "\n" not in str(caught.value) and "mine.toml" in str(caught.value)


def test_the_same_column_twice_is_refused(tmp_path):
    protocol = protocols.load(
        write(tmp_path, 'name="mine"\n[[column]]\nattack="fgsm"\n[[column]]\nattack="fgsm"\n')
    )
    with pytest.raises(ProtocolError, match="'fgsm' twice"):
        protocol.columns(0.1)


def test_an_unknown_protocol_names_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'dwf-paper'"):
        protocols.load("dwf_paper")


def test_a_missing_file_is_an_error():
    with pytest.raises(ProtocolError, match="cannot read the protocol 'none.toml'"):
        protocols.load("none.toml")


def test_attacks_are_added_as_columns_and_to_the_name():
    protocol = with_attacks(protocols.load("quick"), ["autoattack", "torchattacks:MIFGSM"])
    assert protocol.name == "quick+autoattack+MIFGSM"
    assert [c.attack for c in protocol.columns(0.1)][-2:] == ["autoattack", "torchattacks:MIFGSM"]


def test_an_attack_that_needs_more_than_its_name_is_refused():
    with pytest.raises(ProtocolError, match="pgd needs steps"):
        with_attacks(protocols.load("quick"), ["pgd"])


def test_only_the_standard_ensemble_is_called_autoattack():
    spec = {"attack": "autoattack", "settings": {"attacks": ["apgd-ce", "apgd-t"]}}
    protocol = Protocol.model_validate({"name": "mine", "column": [spec, {"attack": "autoattack"}]})
    whole = [c.attack for c in protocol.columns(0.1) if c.part_of is None]
    assert whole == ["clean", "aa-like:apgd-ce+apgd-t", "autoattack"]
    names = [c.name for c in protocol.columns(0.1)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "settings", [{"steps": 10}, {"queries": 100}, {"version": "rand"}, {"version": "plus"}]
)
def test_a_reduced_or_other_ensemble_is_not_called_autoattack(settings):
    spec = {"attack": "autoattack", "settings": settings}
    columns = Protocol.model_validate({"name": "mine", "column": [spec]}).columns(0.1)
    assert columns[-1].attack.startswith("aa-like:")


def test_on_a_random_model_autoattack_is_its_rand_version_and_gradients_are_means():
    columns = protocols.load("standard").columns(0.1, random=True)
    assert columns[-1].attack == "aa-like:rand" and columns[-1].settings["eot"] == 20
    assert {c.eot for c in columns if c.family == "pgd"} == {20}
    assert not any(c.survivors for c in columns)


@pytest.mark.parametrize(
    "classes, parts", [(2, ["apgd-ce", "fab", "square"]), (3, ["apgd-ce", "apgd-dlr", "fab", "square"])]
)
def test_with_few_classes_the_targeted_attacks_are_replaced(classes, parts):
    columns = protocols.load("standard").columns(0.1, classes=classes)
    assert [c.attack for c in columns if c.part_of] == parts
    assert columns[-1].attack.startswith("aa-like:")


def test_8_bit_stands_last_however_it_is_asked_and_has_no_radius_of_its_own():
    with pytest.raises(pydantic.ValidationError, match="leave eps out"):
        ColumnSpec(attack="8-bit", eps=0.1)
