"""A trained tokenizer loses nothing, counts bytes exactly, and is the same every time."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ava_exp.errors import ConfigError
from ava_exp.tokenizer.bpe import MIN_VOCAB_SIZE, SPECIAL_TOKENS, BPETrainer
from ava_exp.tokenizer.tokenizer import Tokenizer

SOURCE = Path(logging.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return BPETrainer(vocab_size=1024, min_frequency=2).make([SOURCE])


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
@example("<|end_of_document|><|user|>")
@example("\ufeff\u0000 \u2028\u0085 e\u0301 ﬁ ẞ 🙂\U0010ffff Ġ Ċ")
@example("\tif x:\r\n\r\n        return  1   \n\n\n  ")
@example(" " * 5000 + "." * 5000 + "\n" * 5000)
def test_any_text_comes_back_and_its_bytes_add_up(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_special_tokens_are_first_stand_for_no_bytes_and_never_come_from_text(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_id(token) for token in SPECIAL_TOKENS] == list(range(8))
    assert tokenizer.end_of_document_id == 0
    lengths = tokenizer.token_bytes()
    assert lengths[:8].sum() == 0
    assert (lengths[8:] > 0).all()
    assert lengths.shape == (tokenizer.vocab_size,) == (1024,)
    assert min(tokenizer.encode("".join(SPECIAL_TOKENS))) >= 8


def test_every_byte_has_a_token(tokenizer: Tokenizer) -> None:
    assert (tokenizer.token_bytes() == 1).sum() == 256


def test_a_batch_is_its_texts(tokenizer: Tokenizer) -> None:
    texts = ["def f():", "", "    return 1\n"]
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
    assert {ids.dtype for ids in batch} == {np.dtype(np.uint32)}


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    again = BPETrainer(vocab_size=1024, min_frequency=2).make(iter([SOURCE]))
    assert again.fingerprint == tokenizer.fingerprint
    assert BPETrainer(vocab_size=1023, min_frequency=2).make([SOURCE]).fingerprint != tokenizer.fingerprint


def test_code_takes_one_token_where_it_is_usual(tokenizer: Tokenizer) -> None:
    for piece in ("self", " return", ":\n        "):
        assert len(tokenizer.encode(piece)) == 1
    assert len(SOURCE.encode()) / len(tokenizer.encode(SOURCE)) > 3


def test_saving_and_loading_changes_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    text = SOURCE[:2000] + "<|user|>"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert np.array_equal(loaded.token_bytes(), tokenizer.token_bytes())


def test_a_small_text_gives_fewer_tokens_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = BPETrainer(vocab_size=1000, min_frequency=2).make(["aa bb aa"])
    assert MIN_VOCAB_SIZE <= tokenizer.vocab_size < 270
    assert f"gave {tokenizer.vocab_size} tokens of the 1000 asked for" in caplog.text


def test_a_pair_must_occur_often_enough_to_be_merged() -> None:
    texts = ["ab " * 4 + "cd " * 2]
    sizes = [BPETrainer(vocab_size=400, min_frequency=times).make(texts).vocab_size for times in (2, 3, 5)]
    assert sizes[0] > sizes[1] > sizes[2] == MIN_VOCAB_SIZE


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`tokenizer.vocab_size` must be at least 264 .* but is 263 instead"):
        BPETrainer(vocab_size=263, min_frequency=2)
