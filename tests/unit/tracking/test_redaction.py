"""Secrets are hidden, and nothing that only looks like one."""

from __future__ import annotations

import pytest

from ava_exp.tracking.redaction import HIDDEN, is_secret, redact, redact_text


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "hub.token",
        "HF_TOKEN",
        "accessToken",
        "API_KEY",
        "db_password",
        "aws_secret_access_key",
        "Authorization",
    ],
)
def test_keys_of_secrets(key: str) -> None:
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    ["tokens", "budget.tokens", "token_accuracy", "max_new_tokens", "eos_token", "bytes_per_token", "tokenizer", "key"],
)
def test_keys_of_other_things(key: str) -> None:
    assert not is_secret(key)


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("postgresql://me:hunter2@host/db", f"postgresql://me:{HIDDEN}@host/db"),
        ("http://u:p@ss@host/x", f"http://u:{HIDDEN}@host/x"),
        ("python -m ava_exp hub.token=hunter2 seed=1", f"python -m ava_exp hub.token={HIDDEN} seed=1"),
        ('{"api_key": "a b", "n": 1}', f'{{"api_key": "{HIDDEN}", "n": 1}}'),
        ("Authorization: Bearer abcdefgh1234", f"Authorization: {HIDDEN} {HIDDEN}"),
        ("sent Bearer abcdefgh1234", f"sent Bearer {HIDDEN}"),
        ("hub:\n  token: hunter2\n  tokens: 5", f"hub:\n  token: {HIDDEN}\n  tokens: 5"),
        ("cannot log in with hf_abcdefghijklmnopqrst", f"cannot log in with hf_{HIDDEN}"),
    ],
)
def test_text_is_redacted_once(text: str, hidden: str) -> None:
    assert redact_text(text) == hidden
    assert redact_text(hidden) == hidden


@pytest.mark.parametrize(
    "text",
    ["loss per token: 2.3", "tokens=512", "http://host:5000/a@b", "next token: foo", "password: null", "sk-learn"],
)
def test_other_text_is_left_alone(text: str) -> None:
    assert redact_text(text) == text


def test_nested_values() -> None:
    value = {
        "hub": {"token": "x", "user": "me"},
        "difference": {"hub.token": [None, "x"]},
        "urls": ["a://b:c@d"],
        "tokens": 5,
    }
    assert redact(value) == {
        "hub": {"token": HIDDEN, "user": "me"},
        "difference": {"hub.token": [None, HIDDEN]},
        "urls": [f"a://b:{HIDDEN}@d"],
        "tokens": 5,
    }
