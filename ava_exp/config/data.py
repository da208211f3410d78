"""Configuration of data sources and tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from omegaconf import II, MISSING

from ava_exp.config.base import ComponentConfig


@dataclass(kw_only=True, slots=True)
class DataConfig(ComponentConfig):
    """Base of every data source. Documents are split by a hash of their name: stable whatever else is added."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"sequence_length", "validation_fraction", "mask_documents"})

    sequence_length: int = 256
    validation_fraction: float = 0.15
    mask_documents: bool = False
    """Whether a token sees its own document only."""


@dataclass(kw_only=True, slots=True)
class StdlibConfig(DataConfig):
    """The running Python's own standard library: sources without tests, and its documentation topics."""

    builds: ClassVar[str] = "ava_exp.data.stdlib:StdlibSource"


class OnBadRow(Enum):
    """What happens at a row that cannot be read."""

    error = "raise"
    skip = "skip"


@dataclass(kw_only=True, slots=True)
class FilesConfig(DataConfig):
    """Local text files: `.txt` is one document a file, `.jsonl` one a line."""

    builds: ClassVar[str] = "ava_exp.data.files:FilesSource"

    paths: list[str] = MISSING
    """Files, folders or glob patterns."""
    text_field: str = "text"
    on_bad_row: OnBadRow = OnBadRow.error
    max_bad_rows: int = 100


@dataclass(kw_only=True, slots=True)
class TokenizerConfig(ComponentConfig):
    """Base of every tokenizer."""


@dataclass(kw_only=True, slots=True)
class BPEConfig(TokenizerConfig):
    """Byte-level byte-pair encoding trained on the training split, cached by content."""

    builds: ClassVar[str] = "ava_exp.tokenizer.bpe:BPETrainer"

    vocab_size: int = II("model.vocab_size")
    min_frequency: int = 2


@dataclass(kw_only=True, slots=True)
class FileTokenizerConfig(TokenizerConfig):
    """An existing tokenizer in the `tokenizer.json` format of Hugging Face."""

    builds: ClassVar[str] = "ava_exp.tokenizer.file:FileTokenizer"

    path: str = MISSING
