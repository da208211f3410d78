"""A data source becomes token shards once, and whatever they were made from is seen when it changes."""

from __future__ import annotations

import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest

from ava_exp.config.data import BPEConfig, FilesConfig, FileTokenizerConfig, OnBadRow
from ava_exp.data.document import BadRow, Document
from ava_exp.data.prepare import PreparedData, prepare_data
from ava_exp.data.shards import TokenDataset
from ava_exp.data.split import Split, split_of
from ava_exp.errors import DataError

NUM_FILES = 40


def text_of(index: int) -> str:
    return f"def function_{index}(x):\n    return x + {index}  # Größe\n" * 3


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(NUM_FILES):
        (folder / f"{index:02d}.txt").write_text(text_of(index), encoding="utf-8")
    return folder


def prepare(
    corpus: Path, vocab_size: int = 300, validation_fraction: float = 0.3, lines: list[str] | None = None
) -> PreparedData:
    data = FilesConfig(paths=[str(corpus)], validation_fraction=validation_fraction)
    tokenizer = BPEConfig(vocab_size=vocab_size)
    printed: list[str] = [] if lines is None else lines
    return prepare_data(data, tokenizer, corpus.parent / "cache", printed.append)


def decoded(prepared: PreparedData, dataset: TokenDataset) -> list[str]:
    """Return the texts of a split's documents."""
    text = prepared.tokenizer.decode(dataset.tokens(0, dataset.num_tokens).tolist())
    return text.split("<|end_of_document|>")[:-1]


def test_every_document_is_in_its_split_in_order_and_unchanged(corpus: Path) -> None:
    prepared = prepare(corpus)
    texts: dict[Split, list[str]] = {Split.train: [], Split.validation: []}
    for index in range(NUM_FILES):
        texts[split_of(f"corpus/{index:02d}.txt", 0.3)].append(text_of(index))
    assert decoded(prepared, prepared.train) == texts[Split.train]
    assert decoded(prepared, prepared.validation) == texts[Split.validation]


def test_statistics_and_baselines_are_what_the_documents_give(corpus: Path) -> None:
    prepared = prepare(corpus)
    raws = [text.encode() for text in decoded(prepared, prepared.validation)]
    size = sum(map(len, raws))
    statistics = prepared.statistics.validation
    assert (statistics.num_documents, statistics.num_bytes) == (len(raws), size)
    assert statistics.bytes_per_token == size / prepared.validation.num_tokens
    assert prepared.baselines.gzip_bits_per_byte == 8 * sum(len(gzip.compress(raw, 9)) for raw in raws) / size
    assert prepared.baselines.xz_bits_per_byte == 8 * sum(len(lzma.compress(raw)) for raw in raws) / size


def test_token_bytes_add_up_to_the_documents(corpus: Path) -> None:
    prepared = prepare(corpus)
    lengths = prepared.tokenizer.token_bytes()
    tokens = prepared.train.tokens(0, prepared.train.num_tokens)
    assert lengths[tokens].sum() == prepared.statistics.train.num_bytes


def test_the_second_run_finds_everything(corpus: Path) -> None:
    first = prepare(corpus)
    lines: list[str] = []
    second = prepare(corpus, lines=lines)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert [line.endswith("(found in the cache)") for line in lines] == [True] * 3
    assert first.train.manifest == second.train.manifest
    assert first.statistics == second.statistics
    assert first.baselines == second.baselines


def test_size_and_fingerprint_are_printed(corpus: Path) -> None:
    lines: list[str] = []
    prepared = prepare(corpus, lines=lines)
    size = prepared.statistics.train.num_bytes + prepared.statistics.validation.num_bytes
    assert any(f"{size / 1e6:.1f} MB" in line and prepared.fingerprint[:12] in line for line in lines)


def test_the_tokenizer_sees_the_training_split_only(corpus: Path) -> None:
    before = prepare(corpus)
    held_out = next(index for index in range(NUM_FILES) if split_of(f"corpus/{index:02d}.txt", 0.3) is Split.validation)
    (corpus / f"{held_out:02d}.txt").write_text("zyzzyva zyzzyva zyzzyva zyzzyva " * 200)
    after = prepare(corpus)
    assert after.fingerprint != before.fingerprint
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint


def test_other_settings_are_other_entries(corpus: Path) -> None:
    prepared = [prepare(corpus), prepare(corpus, vocab_size=290), prepare(corpus, validation_fraction=0.5)]
    assert [one.from_cache for one in prepared] == [False] * 3
    assert len({one.train.folder for one in prepared}) == 3
    assert prepare(corpus).from_cache


def test_an_existing_tokenizer_gives_the_same_tokens(corpus: Path) -> None:
    trained = prepare(corpus)
    path = corpus.parent / "tokenizer.json"
    trained.tokenizer.save(path)
    data = FilesConfig(paths=[str(corpus)], validation_fraction=0.3)
    loaded = prepare_data(
        data, FileTokenizerConfig(path=str(path)), corpus.parent / "cache", on_progress=lambda _: None
    )
    assert loaded.tokenizer.fingerprint == trained.tokenizer.fingerprint
    assert loaded.train.manifest == trained.train.manifest


def test_bad_rows_are_listed_beside_the_cached_summary(corpus: Path) -> None:
    path = corpus / "rows.jsonl"
    path.write_text('{"text": 3}\n')
    data = FilesConfig(paths=[str(corpus)], validation_fraction=0.3, on_bad_row=OnBadRow.skip)
    for _ in range(2):
        lines: list[str] = []
        prepared = prepare_data(data, BPEConfig(vocab_size=300), corpus.parent / "cache", lines.append)
        assert [(row.file, row.line) for row in prepared.statistics.bad_rows] == [(str(path), 1)]
        listed = next(line.rsplit(" ", 1)[1] for line in lines if "rows could not be read" in line)
        assert json.loads(Path(listed).read_text())["bad_rows"][0]["line"] == 1


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_an_empty_split_says_what_to_do(corpus: Path, fraction: float) -> None:
    with pytest.raises(DataError, match=rf"validation_fraction={fraction}.*both need one.*change the fraction"):
        prepare(corpus, validation_fraction=fraction)


@pytest.mark.parametrize("kind", ["sources", "tokenizers", "tokens"])
def test_a_damaged_cache_entry_is_named_and_made_again(
    corpus: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = prepare(corpus)
    for path in (corpus.parent / "cache" / kind).rglob("*.*"):
        if path.suffix in (".json", ".bin"):
            path.write_bytes(path.read_bytes()[:-5])
    second = prepare(corpus)
    assert "A cache entry is damaged and is made again" in caplog.text
    assert first.train.manifest == second.train.manifest
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint


def test_a_cached_tokenizer_that_was_altered_is_not_used(corpus: Path) -> None:
    first = prepare(corpus)
    path = next((corpus.parent / "cache" / "tokenizers").rglob("tokenizer.json"))
    path.write_text(path.read_text().replace("<|unused_1|>", "<|unused_7|>"))
    assert prepare(corpus).tokenizer.fingerprint == first.tokenizer.fingerprint


def test_documents_that_change_while_they_are_read_are_refused(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Changing:
        """Gives another text at each pass."""

        def __init__(self) -> None:
            self.bad_rows: list[BadRow] = []
            self.num_passes = 0

        def describe(self) -> str:
            return "changing"

        def stamp(self) -> str:
            return "always the same"

        def documents(self) -> list[Document]:
            self.num_passes += 1
            return [Document(f"{index}", f"text {self.num_passes}") for index in range(NUM_FILES)]

    source = Changing()
    monkeypatch.setattr(FilesConfig, "build", lambda _: source)
    for _ in range(2):  # a second run reads the source anew instead of trusting the same summary
        passes = source.num_passes
        with pytest.raises(DataError, match="changed while they were read"):
            prepare(corpus)
        assert source.num_passes == passes + 2


PREPARE = """
import sys
from pathlib import Path
from ava_exp.config.data import BPEConfig, FilesConfig
from ava_exp.data.prepare import prepare_data
data = FilesConfig(paths=[sys.argv[1]], validation_fraction=0.3)
prepared = prepare_data(data, BPEConfig(vocab_size=300), Path(sys.argv[2]), lambda line: None)
print(prepared.from_cache, prepared.train.num_tokens, "torch" in sys.modules)
"""


def test_processes_that_start_together_share_one_preparation(corpus: Path) -> None:
    command = [sys.executable, "-c", PREPARE, str(corpus), str(corpus.parent / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(output[0] for output in outputs) == ["False", "True", "True", "True"]
    assert len({output[1] for output in outputs}) == 1
    assert {output[2] for output in outputs} == {"False"}  # preparing data needs no torch
    assert len(list((corpus.parent / "cache" / "tokens").glob("*/train"))) == 1
