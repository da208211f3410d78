"""Existing tokenizers are used as they are, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ava_exp.errors import DataError
from ava_exp.tokenizer.file import PROBE, FileTokenizer

TEXT = "def function(argument):\n    return argument + 1\n" * 5 + PROBE


def byte_level(end: str | None = "<|endoftext|>") -> tokenizers.Tokenizer:
    """Return a tokenizer as GPT-2's."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [] if end is None else [end]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """Return a tokenizer as Llama's: characters, bytes for unknown ones, and U+2581 for a space."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abdefinortux"]
    backend = tokenizers.Tokenizer(
        models.BPE({token: index for index, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def saved(backend: tokenizers.Tokenizer, folder: Path) -> str:
    backend.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_text_comes_back_and_its_bytes_add_up(tmp_path: Path, make: Callable[[], tokenizers.Tokenizer]) -> None:
    tokenizer = FileTokenizer(saved(make(), tmp_path)).make()
    for text in (PROBE, TEXT, "日本語 <|endoftext|> </s> x"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("end", ["<|end_of_document|>", "<|endoftext|>", "</s>", "<|eos|>"])
def test_the_end_of_a_document_is_found(tmp_path: Path, end: str) -> None:
    tokenizer = FileTokenizer(saved(byte_level(end), tmp_path)).make()
    assert tokenizer.end_of_document_id == tokenizer.token_id(end) is not None


def test_a_folder_stands_for_the_file_in_it(tmp_path: Path) -> None:
    path = saved(byte_level(), tmp_path)
    assert FileTokenizer(str(tmp_path)).make().fingerprint == FileTokenizer(path).make().fingerprint


def test_stored_truncation_and_padding_are_not_applied(tmp_path: Path) -> None:
    backend = byte_level()
    plain = FileTokenizer(saved(backend, tmp_path)).make()
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=500)
    tokenizer = FileTokenizer(saved(backend, tmp_path)).make()
    assert tokenizer.encode(TEXT) == plain.encode(TEXT)
    assert tokenizer.fingerprint == plain.fingerprint


def test_added_tokens_that_are_text_count_their_bytes(tmp_path: Path) -> None:
    backend = byte_level()
    backend.add_tokens([AddedToken("größe", normalized=False)])
    tokenizer = FileTokenizer(saved(backend, tmp_path)).make()
    ids = tokenizer.encode("die größe")
    assert tokenizer.token_id("größe") in ids
    assert tokenizer.token_bytes()[ids].sum() == len("die größe".encode())


def test_a_tokenizer_without_an_end_of_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no token that ends a document.*`<\|end_of_document\|>`"):
        FileTokenizer(saved(byte_level(end=None), tmp_path)).make()


def test_a_tokenizer_that_changes_text_is_refused(tmp_path: Path) -> None:
    backend = byte_level()
    backend.normalizer = normalizers.Lowercase()
    with pytest.raises(DataError, match=r"changes text: .*größe.*Use a lossless one"):
        FileTokenizer(saved(backend, tmp_path)).make()


@pytest.mark.parametrize("content", [b"", b"{}", b"[1", b"\xff\xfe", b'{"model": {"type": "Nothing"}}'])
def test_what_is_no_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json is not a `tokenizer.json`"):
        FileTokenizer(str(tmp_path / "tokenizer.json")).make()


@pytest.mark.parametrize("path", ["missing.json", "a\0b", "/"])
def test_a_path_that_cannot_be_read_is_named(path: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        FileTokenizer(path).make()


def test_a_file_larger_than_any_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(byte_level(), tmp_path)
    monkeypatch.setattr("ava_exp.tokenizer.tokenizer.MAX_FILE_BYTES", 1000)
    with pytest.raises(DataError, match="too large for a tokenizer: the limit is 1,000 bytes"):
        FileTokenizer(path).make()
