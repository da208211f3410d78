"""The report: one well-formed page that needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.metrics import MetricsFile, read_metrics
from ava_exp.tracking.report import write_report

WriteRun = Callable[..., RunFolder]
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects text and addresses."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def _page(folder: RunFolder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_the_page_needs_nothing_but_itself(run_folder: RunFolder) -> None:
    html = write_report(run_folder).read_text(encoding="utf-8")
    page = Page(html)
    assert not page.tags & {"script", "iframe", "object", "embed", "form", "base"}
    assert all(address.startswith("data:") for address in page.addresses)
    assert sum(address.startswith("data:image/png;base64,iVBOR") for address in page.addresses) == 7
    assert not re.search(r"url\(|@import|https?:", html)


def test_it_tells_what_the_run_reached(run_folder: RunFolder) -> None:
    text = _page(run_folder).text
    summary = run_folder.read_json("summary.json")
    assert "quick-1a2b3c4d" in text and "finished" in text
    assert f"{summary['final']['loss']:.3f}" in text and f"{summary['final']['token_accuracy']:.1%}" in text
    assert "66.1M" in text and "23.5M" in text and "492k" in text and "2 min 48 s" in text
    assert "stdlib" in text and "byte-level BPE" in text and "Example CPU" in text and "2.13.0" in text
    assert "Experts at step 120" in text


def test_the_experts_are_told_by_layer(tmp_path: Path, write_fake_run: WriteRun) -> None:
    folder = write_fake_run(tmp_path / "run", num_steps=40)
    text = re.sub(r"\s+", " ", _page(folder).text)
    assert "entropyGinivisits per tokendroppeddeadentropy of a token, natschurnNMI with source" in text
    unknown = ("churn", "sources", "source_load", "source_information", "dropped_share")
    bare = [
        {name: value for name, value in record.items() if name not in unknown}
        for record in read_metrics(folder.metrics)
    ]
    folder.metrics.unlink()
    with MetricsFile(folder.metrics) as metrics:
        for record in bare:
            metrics.append(record)
    text = _page(folder).text
    assert "NMI with source" not in text and "visits per token" in text


def test_learned_activations_are_told_by_network(tmp_path: Path, write_fake_run: WriteRun) -> None:
    folder = write_fake_run(tmp_path / "run", num_steps=40)
    assert "Activations at step" not in _page(folder).text
    (*_, last) = (record for record in read_metrics(folder.metrics) if record["kind"] == "eval")
    weights = {"layer_0": {"gelu": 0.5, "tanh": 0.5}, "layer_0_shared": {"gelu": 0.875, "tanh": 0.125}}
    with MetricsFile(folder.metrics) as metrics:
        metrics.append({**last, "step": 41, "activation_weights": weights})
    text = re.sub(r"\s+", " ", _page(folder).text)
    assert "Activations at step 41" in text and "layer 0 shared" in text and "87.5%" in text and "12.5%" in text


@pytest.mark.parametrize(
    ("bits", "verdict"),
    [
        (1.9, "the general compressors are still ahead"),
        (1.65, "better than gzip -9."),
        (1.5, "better than gzip -9 and xz."),
    ],
)
def test_it_says_what_bits_per_byte_mean(run_folder: RunFolder, bits: float, verdict: str) -> None:
    summary = run_folder.read_json("summary.json")
    run_folder.write_json("summary.json", {**summary, "final": {**summary["final"], "bits_per_byte": bits}})
    text = _page(run_folder).text
    assert f"this model needs {bits:.2f} bits on average; stored plainly it takes 8" in text
    assert "gzip -9 needs 1.71 and xz needs 1.62" in text
    assert verdict in text


def test_what_the_model_writes_cannot_become_markup(run_folder: RunFolder) -> None:
    run_folder.samples.write_text("</pre><script>alert(1)</script> & <b>\ufffd")
    run_folder.write_json("difference.json", {"<i>key": ["<u>", '"><img src=x>']})
    page = _page(run_folder)
    assert "<script>alert(1)</script> & <b>" in page.text and '"><img src=x>' in page.text
    assert not page.tags & {"script", "b>", "u"}
    assert "x" not in page.addresses


def test_differences_from_the_default_configuration(run_folder: RunFolder) -> None:
    run_folder.write_json(
        "difference.json", {"optimizer.learning_rate": [1.5e-4, 3e-4], "model.preset": ["quick", "tiny"]}
    )
    text = _page(run_folder).text
    assert re.search(r"model\.preset\s*tiny\s*quick\s*optimizer\.learning_rate\s*0\.0003\s*0\.00015", text)


def test_a_run_as_the_default(run_folder: RunFolder) -> None:
    run_folder.write_json("difference.json", {})
    assert re.search(r"What differs from the default configuration\s*Nothing\.", _page(run_folder).text)


def test_secrets_are_hidden(run_folder: RunFolder) -> None:
    html = write_report(run_folder).read_text(encoding="utf-8")
    assert "hub.token" in html and "hunter2" not in html


def test_a_run_stopped_early_has_a_report_of_what_there_is(tmp_path: Path, write_fake_run: WriteRun) -> None:
    folder = write_fake_run(tmp_path / "run", num_steps=40, finished=False)
    folder.write_json("status.json", {"status": "stopped"})
    page = _page(folder)
    assert "stopped" in page.text and "bits on average" in page.text and "tokens/s" in page.text
    assert "gzip -9 needs" not in page.text and "What it writes" not in page.text


def test_a_run_that_never_began_has_a_report(tmp_path: Path) -> None:
    page = _page(RunFolder(tmp_path / "run").create())
    assert "not been evaluated yet" in page.text and "unknown" in page.text


def test_a_diverged_run_has_a_report(run_folder: RunFolder) -> None:
    nowhere = float("nan")
    lost = {"loss": nowhere, "perplexity": float("inf"), "bits_per_byte": nowhere, "token_accuracy": 0.0}
    run_folder.write_json("summary.json", {**run_folder.read_json("summary.json"), "final": lost, "status": "failed"})
    text = _page(run_folder).text
    assert "failed" in text and "nan" in text and "still ahead" in text
