"""Baselines are those of the compressors' usual settings, document by document."""

from __future__ import annotations

import argparse
import gzip
import lzma
from pathlib import Path

from ava_exp.data.summary import Baselines

TEXT = Path(argparse.__file__).read_bytes()


def test_documents_are_compressed_one_by_one_at_gzips_best_and_xzs_usual_level() -> None:
    baselines = Baselines()
    for raw in (TEXT[:30_000], TEXT[30_000:]):
        baselines.add(raw)
    assert baselines.gzip_bytes == len(gzip.compress(TEXT[:30_000], 9)) + len(gzip.compress(TEXT[30_000:], 9))
    assert baselines.xz_bytes == len(lzma.compress(TEXT[:30_000])) + len(lzma.compress(TEXT[30_000:]))
    assert baselines.gzip_bits_per_byte == 8 * baselines.gzip_bytes / len(TEXT)
    assert 1 < baselines.xz_bits_per_byte < baselines.gzip_bits_per_byte < 3
