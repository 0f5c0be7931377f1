"""What the page says of other people's programs is what tests try."""

import pytest

from tests.integrations import supported
from tests.integrations.supported import BITWISE, CLIENTS, PAGE, README, Client, functions

EVERY_CLIENT = pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)


def test_the_page_has_the_table(capsys):
    assert supported.written(PAGE.read_text()) == PAGE.read_text()
    assert supported.main([]) == 0
    assert capsys.readouterr().out in PAGE.read_text()


def test_readme_has_the_short_one():
    text = README.read_text()
    assert supported.brief() in text
    assert supported.written(text) == text


@EVERY_CLIENT
def test_a_client_is_proved_by_tests_that_exist(client: Client):
    for test in client.tests:
        file, _, name = test.partition("::")
        assert not name or name in functions(file), test
        assert any(function.startswith("test_") for function in functions(file)), test


@EVERY_CLIENT
def test_a_trainer_is_held_to_itself_without_us(client: Client):
    assert client.bitwise == client.trains, f"{client.name} has no {BITWISE}"


@EVERY_CLIENT
def test_its_page_exists(client: Client):
    assert not client.page or (PAGE.parent / client.page).exists()
