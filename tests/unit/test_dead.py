"""What `python -m bridge.dead` says: nothing of a payload unless asked, ids that name one letter, readable tables."""

import argparse
import json

import pytest

from bridge.dead.command import Unknown, arguments, as_text, chosen, facts, parser, table
from bridge.driver.dead_letters import Crash, Letter

LETTER = Letter(
    id="4f1c-1", task="shop.resize", at=0.0, reason="shop.resize was running each of the 2 times",
    crashes=[Crash(0.0, "signal 11 (SIGSEGV)", "w@a", 0, "one"), Crash(1.0, "signal 9 (SIGKILL)", "w@b", 1, "two")],
    logs="loading", exchange="", routing_key="gpu",
    headers={"id": "4f1c-1", "argsrepr": "('s3cret',)", "kwargsrepr": "{}", "token": "s3cret", "retries": 0},
    properties={"reply_to": "s3cret"}, content_type="application/json", content_encoding="utf-8",
    body="czNjcmV0", size_bytes=6,
)  # fmt: skip


class Known:
    def __init__(self, *ids):
        self._ids = list(ids)

    def ids(self):
        return self._ids


def options(*words):
    return parser().parse_args(["drop", *words])


@pytest.mark.parametrize("details", [False, True])
def test_facts_say_nothing_of_a_payload(details):
    said = json.dumps(facts(LETTER, details=details))
    assert "s3cret" not in said and LETTER.body not in said and "token" not in said
    assert "signal 9 (SIGKILL)" in said and "gpu" in said


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["ab1"], ["ab1"]),
        (["ab1", "c"], ["ab1", "cd"]),
        (["c", "cd", "c"], ["cd"]),
        (["ab"], ["ab"]),
        (["--all"], ["ab", "ab1", "ab2", "cd"]),
    ],
)
def test_ids_and_beginnings_of_ids(words, found):
    assert chosen(Known("ab", "ab1", "ab2", "cd"), options(*words)) == found


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["a"], "the beginning of 3 ids: ab, ab1, ab2"),
        (["x"], "no dead letter of x"),
        ([""], "no dead letter of"),
        (["cd", "x"], "no dead letter of x"),
    ],
)
def test_what_names_none_or_several_does_nothing(words, text):
    with pytest.raises(Unknown, match=text):
        chosen(Known("ab", "ab1", "ab2", "cd"), options(*words))


@pytest.mark.parametrize(
    "words", [["-A", "shop:app", "list"], ["list", "-A", "shop:app"], ["--json", "-A", "shop:app", "list", "--json"]]
)
def test_common_options_stand_on_either_side(words):
    assert parser().parse_args(words).app == "shop:app"


@pytest.mark.parametrize(
    "words", [[], ["show"], ["bury", "x"], ["list", "--payload"], ["drop"], ["replay", "a", "--all"]]
)
def test_wrong_usage_ends_with_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        arguments(words)
    assert ended.value.code == 2 and "usage:" in capsys.readouterr().err


def test_a_table_never_cuts_an_id():
    long = "x" * 60
    text = table([("ID", "TASK"), (long, "t" * 60)])
    assert long in text and "t" * 60 not in text and "…" in text


def test_what_is_printed_cannot_command_the_terminal():
    odd = LETTER._replace(id="a\x1b[2Jb", logs="x\x1b]0;title\x07\ny", routing_key="q\r")
    for said in (table([("ID",), (odd.id,)]), as_text(facts(odd, details=True))):
        assert not {"\x1b", "\x07", "\r"} & set(said)


def test_a_payload_is_never_an_option_of_list():
    (commands,) = [each for each in parser()._actions if isinstance(each, argparse._SubParsersAction)]
    assert "--payload" in commands.choices["show"].format_help()
    assert "--payload" not in commands.choices["list"].format_help()
