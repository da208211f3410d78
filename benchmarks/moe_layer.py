"""One mixture of experts against a dense network of equal active FLOPs: `python benchmarks/moe_layer.py`.

    python benchmarks/moe_layer.py [--rounds 15] [--hidden 512] [--tokens 2048] [--case "8 top-2, 2048"]

Forward and backward, with gradients of the input, of the router's weights and of all experts, in bf16 on a CPU. The
dense network is `FeedForward`, k times as wide as one expert. All sides run in one process, in turn (A B C A B C),
after a warm-up. Every round draws new experts for all tokens, so that the numbers of rows are new, as in training:

- uniform: k different experts for each token, all equally likely;
- zipf: the same without replacement from p(i) ∝ 1 / (i + 1), i = 0 … E - 1.

On a machine that others use, threads wait for each other at the end of every product, and the many small products of
a mixture suffer most: `OMP_NUM_THREADS=1 python benchmarks/moe_layer.py --cpu-time` tells what the work itself costs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ava_exp.config.model import Activation
from ava_exp.nn.ffn import FeedForward
from ava_exp.nn.moe.experts import Experts
from ava_exp.runtime import keep_freed_memory

DTYPE = torch.bfloat16
ACTIVATIONS = (Activation.gelu, Activation.swiglu)
WARM_UP_ROUNDS = 4


class Case(NamedTuple):
    """A layer's size, and the greatest ratio to the dense network that it should have."""

    num_experts: int
    top_k: int
    intermediate_size: int
    target: float | None = None

    def __str__(self) -> str:
        return f"{self.num_experts} top-{self.top_k}, {self.intermediate_size}"


CASES = [
    Case(8, 2, 2048, 1.10),
    Case(16, 2, 2048),
    Case(32, 2, 2048),
    Case(64, 2, 2048, 1.8),
    Case(64, 8, 512, 1.5),
]


class SeedExperts(nn.Module):
    """The double loop over choices and experts of the Ava text, without its capacity."""

    def __init__(self, case: Case, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            FeedForward(hidden, case.intermediate_size, activation) for _ in range(case.num_experts)
        )

    def forward(self, x_ND: Tensor, expert_ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        y_ND = torch.zeros_like(x_ND)
        for choice in range(expert_ids_Nk.shape[1]):
            for index, expert in enumerate(self.experts):
                mask = expert_ids_Nk[:, choice] == index
                if mask.any():
                    y_ND[mask] += weights_Nk[mask, choice, None].to(x_ND.dtype) * expert(x_ND[mask])
        return y_ND


class Dense(FeedForward):
    """Every token passes through all of it."""

    def forward(self, x_ND: Tensor, expert_ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x_ND)


def transformers_experts(case: Case, hidden: int, implementation: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=case.intermediate_size, num_local_experts=case.num_experts
    )
    config._experts_implementation = implementation
    return MixtralExperts(config)  # type: ignore[no-any-return]


def build_sides(case: Case, hidden: int, activation: Activation, all_sides: bool) -> dict[str, nn.Module]:
    """Return the layers by name, the dense one first."""
    sides: dict[str, nn.Module] = {
        "dense": Dense(hidden, case.top_k * case.intermediate_size, activation),
        "ours": Experts(case.num_experts, hidden, case.intermediate_size, activation),
    }
    if all_sides and activation is Activation.swiglu:
        sides["transformers grouped_mm"] = transformers_experts(case, hidden, "grouped_mm")
    if all_sides and case.num_experts == 8:
        if activation is Activation.swiglu:
            sides["transformers eager"] = transformers_experts(case, hidden, "eager")
        sides["double loop"] = SeedExperts(case, hidden, activation)
    for side in sides.values():
        side.to(DTYPE)
        for parameter in side.parameters():
            nn.init.normal_(parameter, 0, 0.02)
    return sides


def draw(routing: str, num_tokens: int, case: Case) -> tuple[Tensor, Tensor]:
    """Return k different experts for every token and weights that sum to 1: the first k of a race with these odds."""
    rank = torch.arange(1, case.num_experts + 1)
    odds_E = 1 / rank if routing == "zipf" else torch.ones(case.num_experts)
    race_NE = torch.empty(num_tokens, case.num_experts).exponential_() / odds_E
    expert_ids_Nk = race_NE.topk(case.top_k, largest=False).indices
    weights_Nk = torch.rand(num_tokens, case.top_k)
    return expert_ids_Nk, weights_Nk / weights_Nk.sum(dim=1, keepdim=True)


def seconds(
    clock: Callable[[], float],
    layer: nn.Module,
    x_ND: Tensor,
    expert_ids_Nk: Tensor,
    weights_Nk: Tensor,
    grad_ND: Tensor,
) -> float:
    """Return the time of one forward and backward pass."""
    x_ND, weights_Nk = x_ND.detach().requires_grad_(), weights_Nk.detach().requires_grad_()
    started = clock()
    layer(x_ND, expert_ids_Nk, weights_Nk).backward(grad_ND)
    taken = clock() - started
    layer.zero_grad(set_to_none=True)
    return taken


def compare(
    clock: Callable[[], float],
    sides: dict[str, nn.Module],
    draws: Callable[[], tuple[Tensor, Tensor]],
    hidden: int,
    rounds: int,
) -> dict[str, list[float]]:
    """Return each side's times, one a round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(WARM_UP_ROUNDS + rounds):
        expert_ids_Nk, weights_Nk = draws()
        x_ND, grad_ND = torch.randn(2, expert_ids_Nk.shape[0], hidden).to(DTYPE)
        for name, layer in sides.items():
            times[name].append(seconds(clock, layer, x_ND, expert_ids_Nk, weights_Nk, grad_ND))
    return {name: taken[WARM_UP_ROUNDS:] for name, taken in times.items()}


def report(times: dict[str, list[float]], label: str, target: float | None) -> None:
    """Print a row a side: median and quartiles in milliseconds, and the quartiles of the ratio to the dense network."""
    for name, taken in times.items():
        ratios = [own / dense for own, dense in zip(taken, times["dense"], strict=True)]
        low, middle, high = statistics.quantiles(taken, n=4)
        ratio_low, ratio, ratio_high = statistics.quantiles(ratios, n=4)
        goal = f"≤ {target:.2f}" if target and name == "ours" else ""
        print(
            f"| {label} | {name} | {middle * 1e3:.1f} ({low * 1e3:.1f} – {high * 1e3:.1f}) "
            f"| {ratio:.2f} ({ratio_low:.2f} – {ratio_high:.2f}) | {goal} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--case", choices=[str(case) for case in CASES], action="append", help="these alone")
    parser.add_argument("--activation", choices=[a.name for a in ACTIVATIONS], help="this alone")
    parser.add_argument("--only", action="store_true", help="ours and dense alone")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for a busy machine and one thread")
    arguments = parser.parse_args()
    keep_freed_memory()  # as a run does
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rounds} rounds\n")
    print("| experts, width | activation, routing | side | ms, median (quartiles) | ratio to dense | target |")
    print("|---|---|---|---|---|---|")
    for case in CASES:
        for activation in ACTIVATIONS:
            if str(case) not in (arguments.case or [str(case)]) or arguments.activation not in (None, activation.name):
                continue
            sides = build_sides(case, arguments.hidden, activation, not arguments.only)
            for routing in ("uniform", "zipf"):
                times = compare(
                    time.process_time if arguments.cpu_time else time.perf_counter,
                    sides,
                    lambda case=case, routing=routing: draw(routing, arguments.tokens, case),
                    arguments.hidden,
                    arguments.rounds,
                )
                report(times, f"{case} | {activation.name}, {routing}", case.target)


if __name__ == "__main__":
    main()
