"""What routers do with text that is not trained on: load, certainty, steadiness, and a taste for certain sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ava_exp.data.loader import IGNORED, Batch
from ava_exp.nn.moe.routing import Routing

PROBE_TOKENS = 4096
"""Tokens whose choices are compared from one evaluation to the next; whole windows, and at least one."""

Windows = npt.NDArray[np.int64]


def choose_probe(windows: Windows, sequence_length: int) -> Windows:
    """Return the windows of evaluation, spread evenly, whose tokens are the probe."""
    count = min(len(windows), max(1, PROBE_TOKENS // sequence_length))
    return windows[np.arange(count) * len(windows) // count]


@dataclass(slots=True, kw_only=True, frozen=True)
class ProbeChoices:
    """The experts that the probe's tokens visited, in a compact form."""

    windows: Tensor
    """Shape (W,), int64."""
    num_experts: list[int]
    """By layer."""
    expert_ids: list[Tensor]
    """By layer, (tokens, k) int16: -1 is no visit."""

    def to_tensors(self) -> dict[str, Tensor]:
        """Return what `from_tensors` restores."""
        layers = {f"probe_layer_{layer}": ids for layer, ids in enumerate(self.expert_ids)}
        return {"probe_windows": self.windows, "probe_num_experts": torch.tensor(self.num_experts), **layers}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> ProbeChoices | None:
        """Restore choices; None where there are none. Raises KeyError where only some are there."""
        if "probe_windows" not in tensors:
            return None
        num_experts = tensors["probe_num_experts"].tolist()
        return cls(
            windows=tensors["probe_windows"],
            num_experts=num_experts,
            expert_ids=[tensors[f"probe_layer_{layer}"] for layer in range(len(num_experts))],
        )

    def churn_since(self, before: ProbeChoices | None) -> list[float | None]:
        """Return by layer the share of choices that changed; None where the two cannot be compared.

        That is so for the first look, for other text, and for a layer that had another number of experts.
        """
        if before is None or not torch.equal(self.windows, before.windows):
            return [None] * len(self.expert_ids)
        assert len(self.expert_ids) == len(before.expert_ids), "a model keeps its layers"
        comparable = [now == then for now, then in zip(self.num_experts, before.num_experts, strict=True)]
        return [
            churn(ids, ids_before, count) if same else None
            for ids, ids_before, count, same in zip(
                self.expert_ids, before.expert_ids, self.num_experts, comparable, strict=True
            )
        ]


def churn(expert_ids_Nk: Tensor, before_Nj: Tensor, num_experts: int) -> float:
    """Return the share of N tokens' choices that changed; -1 is no choice, and k may differ from j.

    A token with choices A now and B before has max(|A|, |B|) - |A ∩ B| changes of max(|A|, |B|). With as many choices
    as before this is 1 minus the router saturation of [muennighoff2024olmoe] §5.1, which compares with the end of the
    training instead.
    """
    now, then = _visited(expert_ids_Nk, num_experts), _visited(before_Nj, num_experts)
    most_N = torch.maximum(now.sum(dim=1), then.sum(dim=1))
    kept = int((now & then).sum())
    total = int(most_N.sum())
    return (total - kept) / total if total else 0.0


def _visited(expert_ids_Nk: Tensor, num_experts: int) -> Tensor:
    """Return (N, E) bool: whether a token visits an expert."""
    ids = expert_ids_Nk.long() % (num_experts + 1)  # -1 is in the last place, which is then left out
    visited = torch.zeros(ids.shape[0], num_experts + 1, dtype=torch.bool, device=ids.device)
    return visited.scatter_(1, ids, True)[:, :num_experts]


def mutual_information(counts_SE: npt.NDArray[np.int64]) -> float:
    """Return how much a visit's source tells of its expert, 0 to 1: 2 I(S; E) / (H(S) + H(E)).

    [vinh2010clusterings] table 2, NMI_sum. 0 where all sources use the experts alike. Few visits overstate it, I by
    about (S - 1) (E - 1) / 2 nats over their number.
    """
    joint = counts_SE / max(1, counts_SE.sum())
    sources, experts = _entropy(joint.sum(axis=1)), _entropy(joint.sum(axis=0))
    information = sources + experts - _entropy(joint)
    return float(max(0.0, 2 * information / (sources + experts))) if sources + experts > 0 else 0.0


def _entropy(shares: npt.NDArray[np.float64]) -> float:
    present = shares[shares > 0]
    return float(-(present * np.log(present)).sum())


@dataclass(kw_only=True, slots=True, frozen=True)
class RoutingMetrics:
    """What an evaluation saw of the routers. All lists are by layer; means are over the tokens that it processed."""

    expert_load: list[list[float]]
    visits_per_token: list[float]
    token_entropy: list[float]
    churn: list[float | None]
    sources: list[str]
    source_load: list[list[list[float]]]
    """By layer and source, how the visits of its tokens are shared by the experts."""
    source_information: list[float]
    choices: ProbeChoices | None

    def record(self) -> dict[str, Any]:
        """Return what the metrics file has of it."""
        record: dict[str, Any] = {
            "expert_load": self.expert_load,
            "visits_per_token": self.visits_per_token,
            "token_entropy": self.token_entropy,
        }
        if any(value is not None for value in self.churn):
            record["churn"] = self.churn
        if len(self.sources) > 1:
            names = {"sources": self.sources, "source_load": self.source_load}
            record |= {**names, "source_information": self.source_information}
        return record


@dataclass(slots=True)
class _LayerSums:
    """One layer so far, on the device: visits (S, E), the sum of its tokens' entropies, and how many these are."""

    visits: Tensor
    entropy: Tensor
    num_tokens: Tensor

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.visits, self.entropy, self.num_tokens


@dataclass(slots=True)
class RoutingObserver:
    """Adds up what routers do while a model is evaluated."""

    sources: Sequence[str]
    """Names of the data set's sources."""
    probe: Windows
    before: ProbeChoices | None = None
    """What the probe's tokens chose the last time."""
    _layers: list[_LayerSums] = field(default_factory=list)
    _choices: dict[int, list[Tensor]] = field(default_factory=dict)

    def add(self, batch: Batch, routings: Sequence[Routing]) -> None:
        """Take one batch of evaluation and its routings; positions without a label are left out."""
        if not routings:
            return
        device = routings[0].expert_ids.device
        valid_N = (batch.labels != IGNORED).flatten()
        self._keep_choices(batch, routings)
        valid_N = valid_N.to(device)
        assert batch.source_ids is not None, "batches of evaluation know their sources"
        sources_N = batch.source_ids.flatten().to(device)
        if not self._layers:
            self._layers = [self._zeros(routing) for routing in routings]
        for layer, routing in zip(self._layers, routings, strict=True):
            valid, sources = routing.of_tokens(valid_N), routing.of_tokens(sources_N)
            layer.visits += _visits_by_source(routing, sources, valid, len(self.sources))
            entropy_N = -torch.special.xlogy(routing.probabilities, routing.probabilities).sum(dim=-1)
            layer.entropy += entropy_N.where(valid, 0.0).sum(dtype=layer.entropy.dtype)
            layer.num_tokens += valid.sum()

    def settle(self) -> None:
        """Bring what was seen to the CPU; no batch is added any more."""
        self._layers = [_LayerSums(*(sums.cpu() for sums in layer.parts)) for layer in self._layers]

    def take(self, other: RoutingObserver) -> None:
        """Add what another one saw of other windows; both have settled."""
        self._choices |= other._choices
        if not self._layers or not other._layers:
            self._layers = self._layers or other._layers
            return
        pairs = zip(self._layers, other._layers, strict=True)
        self._layers = [_LayerSums(*map(torch.add, one.parts, more.parts)) for one, more in pairs]

    def metrics(self) -> RoutingMetrics | None:
        """Return the figures; None for a model without experts."""
        if not self._layers:
            return None
        visits = [layer.visits.cpu().numpy() for layer in self._layers]
        choices = self._probe_choices([counts.shape[1] for counts in visits])
        num_tokens = [max(1, int(layer.num_tokens)) for layer in self._layers]
        return RoutingMetrics(
            expert_load=[_shares(counts.sum(axis=0)) for counts in visits],
            visits_per_token=[int(counts.sum()) / number for counts, number in zip(visits, num_tokens, strict=True)],
            token_entropy=[
                layer.entropy.item() / number for layer, number in zip(self._layers, num_tokens, strict=True)
            ],
            churn=choices.churn_since(self.before) if choices is not None else [None] * len(visits),
            sources=list(self.sources),
            source_load=[[_shares(row) for row in counts] for counts in visits],
            source_information=[mutual_information(counts) for counts in visits],
            choices=choices,
        )

    def _zeros(self, routing: Routing) -> _LayerSums:
        num_experts, device = routing.counts.numel(), routing.counts.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        return _LayerSums(
            torch.zeros(len(self.sources), num_experts, dtype=torch.int64, device=device),
            torch.zeros((), dtype=wide, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
        )

    def _keep_choices(self, batch: Batch, routings: Sequence[Routing]) -> None:
        num_positions = batch.labels.shape[1]
        rows = np.flatnonzero(np.isin(batch.sample_ids, self.probe))
        expert_ids = [routing.expert_ids_of_all(batch.labels.numel()) for routing in routings] if len(rows) else []
        for row in rows:
            valid_T = batch.labels[row] != IGNORED
            of_row = slice(row * num_positions, (row + 1) * num_positions)
            self._choices[int(batch.sample_ids[row])] = [
                ids[of_row].to("cpu", torch.int16)[valid_T] for ids in expert_ids
            ]

    def _probe_choices(self, num_experts: list[int]) -> ProbeChoices | None:
        if not all(int(window) in self._choices for window in self.probe):
            return None
        by_window = [self._choices[int(window)] for window in self.probe]
        return ProbeChoices(
            windows=torch.from_numpy(self.probe.copy()),
            num_experts=num_experts,
            expert_ids=[_stacked(layer) for layer in zip(*by_window, strict=True)],
        )


def _stacked(expert_ids: Sequence[Tensor]) -> Tensor:
    """Put windows on top of one another; one in which all tokens skipped the layer may be narrower than the others."""
    width = max(ids.shape[1] for ids in expert_ids)
    return torch.cat([F.pad(ids, (0, width - ids.shape[1]), value=-1) for ids in expert_ids])


def _visits_by_source(routing: Routing, sources_N: Tensor, valid_N: Tensor, num_sources: int) -> Tensor:
    """Return (S, E) int64: how often tokens of each source visited each expert."""
    width = routing.counts.numel() + 1
    ids_Nk = routing.expert_ids.masked_fill(~valid_N[:, None], -1) % width  # no visit is in the last place
    places = (sources_N[:, None] * width + ids_Nk).flatten()
    visits = torch.zeros(num_sources * width, dtype=torch.int64, device=places.device)
    return visits.scatter_add_(0, places, torch.ones_like(places)).view(num_sources, width)[:, :-1]


def _shares(counts: npt.NDArray[np.int64]) -> list[float]:
    shares: list[float] = (counts / max(1, counts.sum())).tolist()
    return shares
