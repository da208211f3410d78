"""Loss by position against a direct computation, its bins, and the file and table that keep it."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from ava_exp.config.architecture import Architecture
from ava_exp.config.model import ModelConfig
from ava_exp.config.stage import PositionBins
from ava_exp.data.loader import IGNORED, Batch
from ava_exp.evaluation.positions import (
    PositionLoss,
    bin_edges,
    evaluate_by_position,
    evaluate_in_pieces,
)
from ava_exp.losses.cross_entropy import label_nats, score_labels
from ava_exp.models.decoder import Decoder, build_model
from ava_exp.tracking.figures import write_position_figure
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.positions import PositionCurve, PositionReport

CPU = torch.device("cpu")


def decoder() -> Decoder:
    model = ModelConfig(
        vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=16, initializer_range=0.3
    )
    return build_model(Architecture(model))


def batches(length: int = 12) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(50, (5, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[4, 7:] = IGNORED
    return [
        Batch(input_ids=tokens[rows, :-1], labels=labels[rows], sample_ids=np.arange(5)[rows])
        for rows in (slice(0, 3), slice(3, 5))
    ]


def test_against_a_direct_computation() -> None:
    model = decoder()
    nats, tokens = [0.0] * 12, [0] * 12
    for batch in batches():
        log_p = model(batch.input_ids).logits.double().log_softmax(dim=-1)
        for row, labels in enumerate(batch.labels.tolist()):
            for position, label in enumerate(labels):
                if label != IGNORED:
                    nats[position] -= log_p[row, position, label].item()
                    tokens[position] += 1
    measured = evaluate_by_position(model, batches(), CPU)
    assert measured.tokens.tolist() == tokens
    assert measured.nats.tolist() == pytest.approx(nats, rel=1e-5)
    assert measured.loss == pytest.approx(sum(nats) / sum(tokens), rel=1e-6)
    assert measured.binned([0, 3, 12]) == pytest.approx(
        [sum(nats[:3]) / sum(tokens[:3]), sum(nats[3:]) / sum(tokens[3:])], rel=1e-5
    )
    assert measured.tokens_by_bin([0, 3, 12]) == [15, sum(tokens[3:])]


def test_how_windows_are_batched_makes_no_difference() -> None:
    model = decoder()
    whole = evaluate_by_position(model, batches(), CPU)
    one_by_one = [
        Batch(input_ids=batch.input_ids[row : row + 1], labels=batch.labels[row : row + 1], sample_ids=batch.sample_ids)
        for batch in batches()
        for row in range(len(batch.labels))
    ]
    assert evaluate_by_position(model, one_by_one, CPU).nats == pytest.approx(whole.nats, rel=1e-5)


@pytest.mark.parametrize("length", [4, 5, 12, 100])
def test_pieces_predict_the_same_labels_from_less(length: int) -> None:
    model = decoder()
    whole, cut = evaluate_by_position(model, batches(), CPU), evaluate_in_pieces(model, batches(), CPU, length)
    assert cut.tokens.tolist() == whole.tokens.tolist()
    assert cut.nats[:length] == pytest.approx(whole.nats[:length], rel=1e-5)
    assert (cut.nats[length:] != whole.nats[length:]).all()
    if length < 12:
        alone = [
            label_nats(*hidden(model, batch.input_ids[:, length : length + 1]), batch.labels[:, length]).sum().item()
            for batch in batches()
        ]
        assert cut.nats[length] == pytest.approx(sum(alone), rel=1e-5)


def hidden(model: Decoder, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    output = model(ids)
    return output.hidden[:, 0], output.head


def test_the_mode_of_the_model_is_put_back() -> None:
    model = decoder().train()
    evaluate_by_position(model, batches(), CPU)
    assert model.training


def test_label_nats_add_up_to_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ava_exp.losses.cross_entropy.SLICE_VALUES", 100)
    monkeypatch.setattr("ava_exp.losses.cross_entropy.CACHED_VALUES", 40)
    generator = torch.Generator().manual_seed(0)
    x, head = torch.randn(33, 8, generator=generator), torch.randn(20, 8, generator=generator)
    labels = torch.randint(20, (33,), generator=generator)
    labels[5] = IGNORED
    nats = label_nats(x, head, labels)
    expected = torch.nn.functional.cross_entropy(x @ head.t(), labels, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(nats, expected)
    assert nats[5] == 0
    torch.testing.assert_close(nats.sum(), score_labels(x, head, labels)[0])
    assert label_nats(x.bfloat16(), head.bfloat16(), labels).dtype == torch.float32


@pytest.mark.parametrize("length", [1, 5, 16, 33, 100, 4096])
@pytest.mark.parametrize("bins", PositionBins)
def test_bins_cover_every_position_once(length: int, bins: PositionBins) -> None:
    edges = bin_edges(length, bins)
    assert (edges[0], edges[-1]) == (0, length)
    assert all(stop > start for start, stop in itertools.pairwise(edges))
    assert len(edges) <= 17


def test_bins() -> None:
    assert bin_edges(4096, PositionBins.equal) == list(range(0, 4097, 256))
    assert bin_edges(4096, PositionBins.doubling) == [0, 32, 64, 128, 256, 512, 1024, 2048, 4096]


def test_a_bin_without_a_token_is_not_a_number() -> None:
    empty = PositionLoss(nats=np.array([1.0, 0.0]), tokens=np.array([2, 0]))
    assert empty.binned([0, 1])[0] == 0.5
    assert math.isnan(empty.binned([0, 1, 2])[1])


def report() -> PositionReport:
    losses = [math.log(2.0), math.log(4.0), math.log(8.0), float("nan")]
    curve = PositionCurve(run="a-12345678", step=3, losses=losses, loss=1.0)
    return PositionReport(
        length=40, original_length=15, edges=[0, 10, 20, 30, 40], tokens=[5, 5, 5, 0], curves={"as it is": curve}
    )


def test_a_report_is_written_and_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run").create()
    assert PositionReport.read(folder) is None
    report().write(folder)
    again = PositionReport.read(folder)
    assert again is not None
    assert repr(again) == repr(report())  # equal but for not being a number


def test_a_report_in_numbers() -> None:
    assert report().first_new_position == 20
    assert report().perplexity_beyond("as it is") == pytest.approx(8.0)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report().table())
    text = console.export_text()
    assert "10 to 19" in text and "4.0" in text and "as it is" in text and "nan" in text


def test_the_figure(tmp_path: Path) -> None:
    path = write_position_figure(RunFolder(tmp_path / "run").create(), report(), "positions_40")
    assert path.name == "positions_40.png" and path.stat().st_size > 5_000
