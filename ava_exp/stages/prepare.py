"""Read the data source, train the tokenizer, write token shards."""

from __future__ import annotations

from ava_exp.config.run import RunConfig
from ava_exp.errors import EXIT_OK
from ava_exp.stages import assembly


def run(config: RunConfig) -> int:
    """Prepare the data that this command line would train on, and say what it is. Return the exit code."""
    data = assembly.prepare(config, print)
    for name, split in (("train", data.statistics.train), ("validation", data.statistics.validation)):
        print(
            f"{name}: {split.num_documents:,} documents, {split.num_bytes:,} bytes, {split.num_tokens:,} tokens "
            f"({split.bytes_per_token:.2f} bytes a token)"
        )
    print(
        f"Compressed one by one, the validation documents take {data.baselines.gzip_bits_per_byte:.3f} bits per byte "
        f"with gzip -9 and {data.baselines.xz_bits_per_byte:.3f} with xz."
    )
    if data.statistics.bad_rows:
        print(f"{len(data.statistics.bad_rows)} rows were left out, the first: {data.statistics.bad_rows[0]}")
    return EXIT_OK
