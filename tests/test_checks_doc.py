import checks_doc
import pytest

from bench.audit.check import Check


def test_the_page_of_checks_is_what_the_checks_say():
    assert checks_doc.FILE.read_text(encoding="utf-8") == checks_doc.page(checks_doc.written()), (
        "out of date: python tests/checks_doc.py"
    )


@pytest.mark.parametrize("name", list(checks_doc.written()))
def test_every_check_follows_a_rule_that_is_explained(name):
    assert {one.rule for one in checks_doc.written()[name]} <= set(checks_doc.RULES)


def test_a_check_is_one_row_whatever_it_says():
    odd = Check("odd", "A5", 0.0, "warns", "x | y", "when | then", lambda subject, threshold: None)
    row = checks_doc.table([odd]).splitlines()[-1]
    assert row == r"| `odd` | A5 | warns | – | when \| then | x \| y |"
