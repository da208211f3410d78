"""One self-contained page about a run, made from the files in its folder: no scripts, no network."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ava_exp.tracking.experts import layer_statistics, normalized_entropy, relative_load
from ava_exp.tracking.files import restore_numbers, write_atomically
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.metrics import Record, of_kind, read_metrics
from ava_exp.tracking.page import figure_section, page
from ava_exp.tracking.redaction import redact, redact_text
from ava_exp.tracking.text import format_bytes, format_count, format_seconds

BITS_OF_A_BYTE = 8.0
COMPRESSORS = {"gzip": "gzip -9", "xz": "xz"}
CAPTIONS = {
    "loss": "How surprised the model is by the next token. Thin: single steps; thick: their average. "
    "Validation text is never trained on: when its curve turns upwards, the model has begun to learn by heart.",
    "bits_per_byte": "The same, per byte of text, which makes tokenizers comparable; "
    "the grey lines are what general compressors reach on the same documents.",
    "optimisation": "The size of the steps the optimizer takes, and the length of the gradient before it is clipped.",
    "throughput": "Training speed, and the share of the device's peak arithmetic that goes into the model.",
    "experts": "Which experts of every layer the tokens went to: white is the balanced share, red more, blue less.",
    "heads": "Which routed attention heads of every layer the tokens chose: white is the balanced share.",
    "balance": "How the visits of tokens are spread over each layer's experts, which visits found no room, and churn: "
    "what share of the same tokens' choices changed from one evaluation to the next.",
    "specialisation": "Validation text by where it is from: red experts are visited by it more often than by all text, "
    "blue ones less. NMI is the mutual information of source and expert, 0 (unrelated) to 1.",
    "positions": "How surprised the model is by tokens at each place of a long text, before its context was extended "
    "and after, on the same text. Up to the dotted line it had been trained before.",
    "depth": "How many tokens each layer processes where they may skip; below, which tokens skip: the share of layers "
    "that they do not pass through, from the rarest to the most frequent fifth of the text, and by kind.",
}


def write_report(folder: RunFolder) -> Path:
    """Draw the figures of the run and write `report.html`; what the run has not got to is left out.

    Raises:
        RunFolderError: A file cannot be written, or one of the run's files cannot be read.
    """
    from ava_exp.tracking.figures import write_figures

    figures = write_figures(folder)
    write_atomically(folder.report, render(read_run(folder), figures))
    return folder.report


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """What the page is made from."""

    name: str
    status: str
    records: list[Record]
    summary: dict[str, Any]
    metadata: dict[str, Any]
    difference: dict[str, list[Any]]
    config: str
    samples: str


def read_run(folder: RunFolder) -> RunFiles:
    """Read a run's files, without secrets. Where a run was stopped before its summary, the metrics stand in."""
    records = read_metrics(folder.metrics)
    summary = _summary_so_far(records) | restore_numbers(folder.read_json("summary.json", {}))
    return RunFiles(
        name=folder.root.resolve().name,
        status=str(summary.get("status") or folder.read_json("status.json", {}).get("status", "unknown")),
        records=records,
        summary=redact(summary),
        metadata=redact(folder.read_json("metadata.json", {})),
        difference=redact(folder.read_json("difference.json", {})),
        config=redact_text(_text(folder.config)),
        samples=_text(folder.samples),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _summary_so_far(records: list[Record]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    if evaluations := of_kind(records, "eval"):
        summary["final"] = evaluations[-1]
    if train := of_kind(records, "train"):
        last = train[-1]
        summary |= {"tokens": last["tokens"], "seconds": last["elapsed_s"]}
        summary |= {"tokens_per_s": last["tokens_per_s"], "mfu": last.get("mfu")}
    return summary


def render(run: RunFiles, figures: list[Path]) -> str:
    """Return the page."""
    sections = [
        _header(run),
        _compression(run.summary),
        _numbers(run),
        figure_section(figures, CAPTIONS),
        _experts(run.records),
        _activations(run.records),
        _depth(run.records),
        _samples(run.samples),
        _configuration(run),
        _origins(run),
    ]
    return page(run.name, sections)


def _header(run: RunFiles) -> str:
    started = run.metadata.get("started")
    when = f'<p class="soft">started {escape(str(started).replace("T", " "))}</p>\n' if started else ""
    command = run.metadata.get("command")
    status = run.status if run.status in ("finished", "running", "stopped", "failed") else "unknown"
    return (
        f'<header>\n<h1>{escape(run.name)} <span class="status {status}">{escape(run.status)}</span></h1>\n{when}'
        + (f'<code class="command">{escape(command)}</code>\n' if command else "")
        + "</header>\n"
    )


def _compression(summary: Mapping[str, Any]) -> str:
    """Set the model's bits per byte beside the compressors', in a picture and in words."""
    bits = (summary.get("final") or {}).get("bits_per_byte")
    if bits is None:
        return '<p class="card">The run has not been evaluated yet.</p>\n'
    baselines = summary.get("baselines") or {}
    rows = [("this model", bits, "model"), *((COMPRESSORS.get(name, name), baselines[name], "") for name in baselines)]
    most = max((value for _, value, _ in rows if math.isfinite(value)), default=1.0)
    bars = "".join(
        f'<span>{escape(label)}</span><i class="{kind}" style="width: {_share(value, most):.1%}"></i>'
        f"<b>{value:.2f}</b>\n"
        for label, value, kind in rows
    )
    return (
        f'<section class="card compression">\n<div><div class="figure-of-merit">{bits:.2f}</div>'
        f'<div class="soft">bits per byte of unseen text</div></div>\n<div class="bars">\n{bars}</div>\n'
        f"<p>{_meaning(bits, baselines)}</p>\n</section>\n"
    )


def _share(value: float, most: float) -> float:
    return min(1.0, value / most) if math.isfinite(value) and most > 0 else 0.0


def _meaning(bits: float, baselines: Mapping[str, float]) -> str:
    """Say to a newcomer what the number means."""
    text = (
        f"To write down one byte of text that it was never trained on, about one letter, this model needs "
        f"{bits:.2f} bits on average; stored plainly it takes {BITS_OF_A_BYTE:.0f}. "
        "The better a model predicts what comes next, the fewer bits are left to write."
    )
    if not baselines:
        return text
    names = [f"<code>{COMPRESSORS.get(name, name)}</code> needs {value:.2f}" for name, value in baselines.items()]
    beaten = [f"<code>{COMPRESSORS.get(name, name)}</code>" for name, value in baselines.items() if bits < value]
    verdict = (
        "So far, the general compressors are still ahead of this model."
        if not beaten
        else f"This model predicts the text better than {' and '.join(beaten)}."
    )
    return f"{text} On the same documents, one by one, {' and '.join(names)}. {verdict}"


def _numbers(run: RunFiles) -> str:
    """The key numbers, those that are known."""
    summary = run.summary
    final, parameters = summary.get("final") or {}, summary.get("parameters") or {}
    memory = summary.get("memory") or {}
    values = [
        ("loss, nats/token", final.get("loss"), "{:.3f}"),
        ("perplexity", final.get("perplexity"), "{:,.1f}"),
        ("loss, choice of training", final.get("noncausal_loss"), "{:.3f}"),
        ("next tokens right", final.get("token_accuracy"), "{:.1%}"),
        ("parameters", _given(format_count, parameters.get("total")), "{}"),
        ("active per token", _given(format_count, parameters.get("active")), "{}"),
        ("tokens trained on", _given(format_count, summary.get("tokens")), "{}"),
        ("time", _given(format_seconds, summary.get("seconds")), "{}"),
        ("tokens/s", summary.get("tokens_per_s"), "{:,.0f}"),
        ("FLOPs use (MFU)", summary.get("mfu"), "{:.1%}"),
        ("memory at its peak", _given(format_bytes, memory.get("peak_bytes")), "{}"),
        ("memory predicted", _given(format_bytes, memory.get("predicted_bytes")), "{}"),
    ]
    cards = [
        f"<div><span>{label}</span><b>{form.format(value)}</b></div>\n"
        for label, value, form in values
        if value is not None
    ]
    return f'<section class="numbers">\n{"".join(cards)}</section>\n' if cards else ""


def _given(form: Callable[[float], str], value: float | None) -> str | None:
    return None if value is None else form(value)


EXPERT_COLUMNS = {
    "gini": ("Gini", "{:.3f}"),
    "visits_per_token": ("visits per token", "{:.2f}"),
    "dropped_share": ("dropped", "{:.1%}"),
    "dead_experts": ("dead", "{:.0f}"),
    "token_entropy": ("entropy of a token, nats", "{:.2f}"),
    "churn": ("churn", "{:.1%}"),
    "source_information": ("NMI with source", "{:.3f}"),
}
"""Columns of the table of experts, those that a run has: their heads and the form of their numbers."""


def _experts(records: list[Record]) -> str:
    """How the experts of every layer were used at the end, and what the last evaluation saw of the routers."""
    routed = [record for record in of_kind(records, "train") if record.get("expert_load")]
    if not routed:
        return ""
    loads, layers = routed[-1]["expert_load"], layer_statistics(routed[-1])
    if evaluations := of_kind(records, "eval"):
        names = ("token_entropy", "churn", "source_information")
        for layer, seen in zip(layers, layer_statistics(evaluations[-1]), strict=False):
            layer |= {name: seen[name] for name in names if name in seen}
    columns = [name for name in EXPERT_COLUMNS if any(name in layer for layer in layers)]
    titles = (
        "layer",
        "visits by expert",
        "least used",
        "most used",
        "entropy",
        *(EXPERT_COLUMNS[c][0] for c in columns),
    )
    head = "<tr>" + "".join(f"<th>{title}</th>" for title in titles) + "</tr>\n"
    rows = "".join(
        _expert_row(number, load, [_cell(layer, name) for name in columns])
        for number, (load, layer) in enumerate(zip(loads, layers, strict=True))
    )
    return (
        f"<h2>Experts at step {routed[-1]['step']:,}</h2>\n"
        '<section class="card scroll">\n<p class="soft">Least and most used in units of the balanced share, '
        f"which is 1; a Gini coefficient of 0 and an entropy of 100% are a perfect balance.</p>\n"
        f"<table>\n{head}{rows}</table>\n</section>\n"
    )


def _depth(records: list[Record]) -> str:
    """How many tokens passed through every layer at the end, while training and at inference."""
    train = [record for record in of_kind(records, "train") if record.get("layer_usage")]
    if not train:
        return ""
    seen = next((r for r in reversed(of_kind(records, "eval")) if r.get("mod_layers")), {})
    at_inference, right = (
        dict(zip(seen.get("mod_layers") or (), seen.get(name) or (), strict=False))
        for name in ("processed_share", "predictor_accuracy")
    )
    rows = "".join(
        f"<tr><th>{layer}</th>"
        + "".join(
            f'<td class="number">{"–" if share is None else f"{share:.1%}"}</td>'
            for share in (usage, at_inference.get(layer), right.get(layer))
        )
        + "</tr>\n"
        for layer, usage in enumerate(train[-1]["layer_usage"])
    )
    titles = ("layer", "processed while training", "processed of validation text", "predictor right")
    head = "<tr>" + "".join(f"<th>{title}</th>" for title in titles) + "</tr>\n"
    return (
        f"<h2>Depth at step {train[-1]['step']:,}</h2>\n"
        f'<section class="card scroll">\n<p class="soft">The average token passed through '
        f"{train[-1]['average_depth']:.2f} of {len(train[-1]['layer_usage'])} layers, which saved "
        f"{train[-1]['compute_savings']:.1%} of the FLOPs of a step.</p>\n<table>\n{head}{rows}</table>\n</section>\n"
    )


def _cell(layer: Mapping[str, float], name: str) -> str:
    return EXPERT_COLUMNS[name][1].format(layer[name]) if name in layer else "–"


def _expert_row(layer: int, load: list[float], further: list[str]) -> str:
    relative = relative_load(load)
    top = max(relative) or 1.0
    bars = "".join(f'<i style="height: {_share(share, top):.0%}"></i>' for share in relative)
    cells = [f"{min(relative):.2f}", f"{max(relative):.2f}", f"{normalized_entropy(load):.1%}", *further]
    numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    return f'<tr><th>{layer}</th><td><div class="experts">{bars}</div></td>{numbers}</tr>\n'


def _activations(records: list[Record]) -> str:
    """What the layers' mixtures of activations had learned when they were last looked at."""
    mixed = [record for record in of_kind(records, "eval") if record.get("activation_weights")]
    if not mixed:
        return ""
    places = mixed[-1]["activation_weights"]
    names = list(next(iter(places.values())))
    head = "<tr><th>network</th>" + "".join(f"<th>{escape(name)}</th>" for name in names) + "</tr>\n"
    rows = "".join(
        f"<tr><th>{escape(place.replace('_', ' '))}</th>"
        + "".join(f'<td class="number">{weights[name]:.1%}</td>' for name in names)
        + "</tr>\n"
        for place, weights in places.items()
    )
    return (
        f"<h2>Activations at step {mixed[-1]['step']:,}</h2>\n"
        f'<section class="card scroll">\n<table>\n{head}{rows}</table>\n</section>\n'
    )


def _samples(samples: str) -> str:
    return f"<h2>What it writes</h2>\n<pre>{escape(samples.strip())}</pre>\n" if samples.strip() else ""


def _configuration(run: RunFiles) -> str:
    rows = "".join(
        f"<tr><th><code>{escape(key)}</code></th><td><code>{_value(actual)}</code></td>"
        f'<td><code class="was">{_value(default)}</code></td></tr>\n'
        for key, (default, actual) in sorted(run.difference.items())
    )
    table = f"<table>\n<tr><th>key</th><th>this run</th><th>default</th></tr>\n{rows}</table>" if rows else _AS_DEFAULT
    whole = f"<details><summary>the whole configuration</summary><pre>{escape(run.config)}</pre></details>\n"
    return (
        f'<h2>What differs from the default configuration</h2>\n<section class="card scroll">\n{table}\n</section>\n'
        + (whole if run.config else "")
    )


_AS_DEFAULT = '<p class="soft">Nothing.</p>'


def _value(value: Any) -> str:
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _origins(run: RunFiles) -> str:
    """Data, tokenizer, machine and versions."""
    metadata = {
        key: value for key, value in run.metadata.items() if key not in ("packages", "command", "started", "pid")
    }
    if git := metadata.get("git"):
        metadata["git"] = f"{git['commit'][:12]}{', with changes' if git['dirty'] else ''}"
    tables = [
        ("Data", run.summary.get("data")),
        ("Tokenizer", run.summary.get("tokenizer")),
        ("Precision and batch", run.summary.get("runtime")),
        ("Machine", metadata),
        ("Versions", run.metadata.get("packages")),
    ]
    cards = [f'<div class="card">\n<h3>{title}</h3>\n{_table(table)}</div>\n' for title, table in tables if table]
    return f'<h2>Made with</h2>\n<section class="columns">\n{"".join(cards)}</section>\n' if cards else ""


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(key.removesuffix('_bytes').replace('_', ' '))}</th>"
        f"<td>{escape(_readable(key, value))}</td></tr>\n"
        for key, value in values.items()
    )
    return f"<table>\n{rows}</table>\n"


def _readable(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_readable(name, item)}" for name, item in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    if isinstance(value, int | float) and (key == "bytes" or key.endswith("_bytes")):
        return format_bytes(value)
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
