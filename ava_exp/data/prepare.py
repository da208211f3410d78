"""From a data source to token shards: reads, trains the tokenizer, encodes, and finds it all again the next time."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tokenizers

from ava_exp.config.data import DataConfig, TokenizerConfig
from ava_exp.data.cache import cache_key, load_or_build
from ava_exp.data.document import BadRow, Document, Source
from ava_exp.data.fingerprint import Fingerprint
from ava_exp.data.shards import FORMAT_VERSION, ShardWriter, TokenDataset
from ava_exp.data.split import Split, split_of
from ava_exp.data.summary import SUMMARY_FILE, SUMMARY_VERSION, Baselines, SplitSize, Summary
from ava_exp.errors import DataError
from ava_exp.tokenizer.tokenizer import Tokenizer, TokenizerMaker

logger = logging.getLogger(__name__)

GROUP_CHARACTERS = 2**22
"""Length of the documents that are encoded together."""

OnProgress = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitStatistics:
    """Size of one split; `num_tokens` includes the end of every document."""

    num_documents: int
    num_bytes: int
    num_tokens: int

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / self.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class DataStatistics:
    """Size of both splits, and what was left out."""

    train: SplitStatistics
    validation: SplitStatistics
    bad_rows: list[BadRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """Everything that training reads."""

    train: TokenDataset
    validation: TokenDataset
    tokenizer: Tokenizer
    fingerprint: str
    """SHA-256 of the documents, whatever their split."""
    statistics: DataStatistics
    baselines: Baselines
    from_cache: bool
    """Whether the tokens were found, not made."""


def prepare_data(
    data: DataConfig, tokenizer: TokenizerConfig, cache_dir: Path, on_progress: OnProgress = print
) -> PreparedData:
    """Return token shards of a data source, made now or found in `cache_dir`.

    Entries are named by what they were made from. Several processes may call this at once: one works, the others
    wait. Raises `DataError` if the source or the tokenizer cannot be used, or the cache cannot be written.
    """
    work = _Preparation(data.build(), data.validation_fraction, cache_dir, on_progress)
    summary = work.summary()
    trained = work.tokenizer(tokenizer.build(), summary)
    train, validation, from_cache = work.tokens(trained, summary)
    statistics = DataStatistics(
        train=_statistics(summary.train, train),
        validation=_statistics(summary.validation, validation),
        bad_rows=summary.bad_rows,
    )
    on_progress(
        f"tokens: {train.num_tokens:,} to train, {validation.num_tokens:,} to validate, "
        f"{statistics.train.bytes_per_token:.2f} bytes a token{_cached(from_cache)}"
    )
    return PreparedData(
        train=train,
        validation=validation,
        tokenizer=trained,
        fingerprint=summary.fingerprint,
        statistics=statistics,
        baselines=summary.baselines,
        from_cache=from_cache,
    )


@dataclass(frozen=True, slots=True)
class _Preparation:
    """The three steps. Each is a cache entry, and reads the source once where it is missing."""

    source: Source
    validation_fraction: float
    cache_dir: Path
    on_progress: OnProgress

    def summary(self) -> Summary:
        entry = self._summary_entry()
        summary, from_cache = self._entry(
            entry,
            "data: reading",
            Summary.load,
            lambda folder: Summary.of(self.source, self.validation_fraction).save(folder),
        )
        self.on_progress(
            f"data: {self.source.describe()}: {summary.train.num_documents:,} documents to train, "
            f"{summary.validation.num_documents:,} to validate, {summary.num_bytes / 1e6:.1f} MB, "
            f"fingerprint {summary.fingerprint[:12]}{_cached(from_cache)}"
        )
        if summary.bad_rows:
            listed = self.cache_dir / entry / SUMMARY_FILE
            self.on_progress(f"data: {len(summary.bad_rows)} rows could not be read; they are listed in {listed}")
        return summary

    def tokenizer(self, maker: TokenizerMaker, summary: Summary) -> Tokenizer:
        recipe = maker.recipe()
        if recipe is None:
            tokenizer, from_cache = maker.make(()), False
        else:
            tokenizer, from_cache = self._entry(
                Path("tokenizers", cache_key(summary.fingerprint, self.validation_fraction, recipe)),
                f"tokenizer: training on {summary.train.num_bytes / 1e6:.1f} MB",
                _load_tokenizer,
                lambda folder: _save_tokenizer(maker.make(self._training_texts(summary)), folder),
            )
        self.on_progress(
            f"tokenizer: {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint[:12]}{_cached(from_cache)}"
        )
        return tokenizer

    def tokens(self, tokenizer: Tokenizer, summary: Summary) -> tuple[TokenDataset, TokenDataset, bool]:
        made_from = (summary.fingerprint, self.validation_fraction, tokenizer.fingerprint)
        (train, validation), from_cache = self._entry(
            Path("tokens", cache_key(FORMAT_VERSION, tokenizers.__version__, *made_from)),
            f"tokens: encoding {summary.num_bytes / 1e6:.1f} MB",
            _open_splits,
            lambda folder: self._write_tokens(folder, tokenizer, summary),
        )
        return train, validation, from_cache

    def _entry(
        self, entry: Path, doing: str, load: Callable[[Path], T], build: Callable[[Path], None]
    ) -> tuple[T, bool]:
        def announced_build(folder: Path) -> None:
            self.on_progress(doing)
            build(folder)

        return load_or_build(self.cache_dir / entry, load, announced_build, self.on_progress)

    def _summary_entry(self) -> Path:
        key = cache_key(SUMMARY_VERSION, self.source.stamp(), self.validation_fraction)
        return Path("sources", key)

    def _documents(self, summary: Summary) -> Iterator[Document]:
        """Read the source again. Raises `DataError` at its end if it is no longer what the summary says."""
        fingerprint = Fingerprint()
        yield from fingerprint.follow(self.source.documents())
        if fingerprint.hexdigest() != summary.fingerprint:
            # The next run must read the source anew.
            shutil.rmtree(self.cache_dir / self._summary_entry(), ignore_errors=True)
            raise DataError(f"{self.source.describe()}: documents changed while they were read. Run it again.")

    def _training_texts(self, summary: Summary) -> Iterator[str]:
        for document in self._documents(summary):
            if split_of(document.name, self.validation_fraction) is Split.train:
                yield document.text

    def _write_tokens(self, folder: Path, tokenizer: Tokenizer, summary: Summary) -> None:
        writers = {
            split: ShardWriter(
                folder / split.value,
                vocab_size=tokenizer.vocab_size,
                end_of_document_id=tokenizer.end_of_document_id,
            )
            for split in Split
        }
        for documents in _groups(self._documents(summary)):
            encoded = tokenizer.encode_batch([document.text for document in documents])
            for document, tokens in zip(documents, encoded, strict=True):
                if not len(tokens):
                    logger.warning("%s: the tokenizer makes no token of it.", document.name)
                writers[split_of(document.name, self.validation_fraction)].add(tokens, document.source)
        for split, writer in writers.items():
            writer.finish(
                split=split.value,
                source_fingerprint=summary.fingerprint,
                tokenizer_fingerprint=tokenizer.fingerprint,
            )


def _statistics(size: SplitSize, dataset: TokenDataset) -> SplitStatistics:
    return SplitStatistics(num_documents=size.num_documents, num_bytes=size.num_bytes, num_tokens=dataset.num_tokens)


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield documents in groups that are worth encoding in parallel."""
    group: list[Document] = []
    num_characters = 0
    for document in documents:
        group.append(document)
        num_characters += len(document.text)
        if num_characters >= GROUP_CHARACTERS:
            yield group
            group, num_characters = [], 0
    if group:
        yield group


def _open_splits(folder: Path) -> tuple[TokenDataset, TokenDataset]:
    return TokenDataset.open(folder / Split.train.value), TokenDataset.open(folder / Split.validation.value)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(folder / "tokenizer.json")
    (folder / "fingerprint.txt").write_text(tokenizer.fingerprint, encoding="utf-8")


def _load_tokenizer(folder: Path) -> Tokenizer:
    tokenizer, recorded = Tokenizer.load(folder / "tokenizer.json"), folder / "fingerprint.txt"
    if not recorded.is_file() or recorded.read_text(encoding="utf-8", errors="replace") != tokenizer.fingerprint:
        raise DataError(f"{folder / 'tokenizer.json'} is damaged: its fingerprint differs.")
    return tokenizer


def _cached(from_cache: bool) -> str:
    return " (found in the cache)" if from_cache else ""
