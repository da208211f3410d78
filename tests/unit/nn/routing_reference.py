"""Every router once more, token by token, in plain Python and float64, written from the papers' formulas.

Nothing here is shared with the code under test but the configurations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ava_exp.config.model import Activation, Overflow
from ava_exp.config.router import (
    DeepSeekRouterConfig,
    DynamicRouterConfig,
    ExpertChoiceRouterConfig,
    HierarchicalRouterConfig,
    RouterConfig,
    SinkhornRouterConfig,
    SoftRouterConfig,
    SwitchRouterConfig,
    TokenChoiceConfig,
    TopKRouterConfig,
    TwoStageRouterConfig,
)

Vector = list[float]
Matrix = list[Vector]


@dataclass(slots=True)
class Choice:
    """What one token decided: its experts, what each expert would weigh, and in what order it wants them all."""

    chosen: list[int]
    scores: Vector
    order: list[int]
    renormalize: bool = False
    scale: float = 1.0

    def weights(self, experts: list[int]) -> Vector:
        divisor = sum(self.scores[e] for e in experts) if self.renormalize and experts else 1.0
        return [self.scale * self.scores[e] / divisor for e in experts]


@dataclass(slots=True)
class Learned:
    """What a router has learned beside gradients, and whether it is training."""

    bias: Vector = field(default_factory=list)
    threshold: Vector = field(default_factory=list)
    training: bool = True


def product(matrix: Matrix, vector: Vector) -> Vector:
    return [math.fsum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def softmax(values: Vector) -> Vector:
    exponentials = [math.exp(value - max(values)) for value in values]
    return [value / math.fsum(exponentials) for value in exponentials]


def best_first(values: Vector) -> list[int]:
    return sorted(range(len(values)), key=lambda index: -values[index])


def route(config: RouterConfig, weight: Matrix, tokens: Matrix, learned: Learned) -> list[Choice]:
    """Return every token's choice, before any capacity."""
    temperature = config.routing_temperature if isinstance(config, TokenChoiceConfig) else 1.0
    logits = [[value / temperature for value in product(weight, token)] for token in tokens]
    if isinstance(config, SinkhornRouterConfig):
        return _sinkhorn(config, logits, learned)
    if isinstance(config, ExpertChoiceRouterConfig):
        return _expert_choice(config, logits, learned)
    return [_of_one_token(config, values, learned) for values in logits]


def _of_one_token(config: RouterConfig, logits: Vector, learned: Learned) -> Choice:
    match config:
        case TopKRouterConfig():
            p = softmax(logits)
            return Choice(best_first(p)[: config.moe_top_k], p, best_first(p), config.renormalize)
        case SwitchRouterConfig():
            p = softmax(logits)
            return Choice([p.index(max(p))], p, best_first(p))
        case SoftRouterConfig():
            p = softmax(logits)
            return Choice(list(range(len(p))), p, best_first(p))
        case DynamicRouterConfig():
            return _dynamic(config, softmax(logits))
        case TwoStageRouterConfig():
            return _two_stage(config, softmax(logits))
        case DeepSeekRouterConfig():
            return _deepseek(config, logits, learned.bias)
        case HierarchicalRouterConfig():
            return _tree(config, logits)
    raise AssertionError(config)


def _dynamic(config: DynamicRouterConfig, p: Vector) -> Choice:
    chosen: list[int] = []
    for expert in best_first(p):
        if len(chosen) == config.max_experts or sum(p[e] for e in chosen) >= config.threshold:
            break
        chosen.append(expert)
    return Choice(chosen, p, best_first(p), config.renormalize)


def _in_groups(num_experts: int, num_groups: int) -> list[list[int]]:
    size = num_experts // num_groups
    return [list(range(start, start + size)) for start in range(0, num_experts, size)]


def _two_stage(config: TwoStageRouterConfig, p: Vector) -> Choice:
    assert config.num_groups is not None
    groups = _in_groups(len(p), config.num_groups)
    groups.sort(key=lambda group: -max(p[e] for e in group))
    reachable = [e for group in groups[: config.groups_per_token] for e in group]
    order = sorted(reachable, key=lambda e: -p[e])
    return Choice(order[: config.moe_top_k], p, order, config.renormalize)


def _deepseek(config: DeepSeekRouterConfig, logits: Vector, bias: Vector) -> Choice:
    s = [1 / (1 + math.exp(-value)) for value in logits]
    biased = [a + b for a, b in zip(s, bias, strict=True)]
    groups = _in_groups(len(s), config.num_groups)
    groups.sort(key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
    kept = groups[: config.groups_per_token] if config.num_groups > 1 else groups
    order = sorted((e for group in kept for e in group), key=lambda e: -biased[e])
    return Choice(order[: config.moe_top_k], s, order, config.renormalize, config.routed_scaling_factor)


def _tree(config: HierarchicalRouterConfig, logits: Vector) -> Choice:
    """Walk down from the root. A node's logits follow those of all nodes above and to the left of it."""
    levels = config.levels(0 if config.branching else 8)
    paths: list[tuple[int, float]] = [(0, 1.0)]
    followed = [(0, 1.0)]
    start = 0
    for num_children, num_followed in zip(levels, config.choices, strict=True):
        num_parents = len(paths)

        def children(node: int, p: float, first: int = start, n: int = num_children) -> list[tuple[int, float]]:
            own = softmax(logits[first + node * n : first + (node + 1) * n])
            return [(node * n + child, p * probability) for child, probability in enumerate(own)]

        paths = [child for node, p in paths for child in children(node, p)]
        followed = [
            child
            for node, p in followed
            for child in sorted(children(node, p), key=lambda child: -child[1])[:num_followed]
        ]
        start += num_parents * num_children
    scores = [p for _, p in paths]
    return Choice([node for node, _ in followed], scores, best_first(scores), config.renormalize)


def _sinkhorn(config: SinkhornRouterConfig, logits: Matrix, learned: Learned) -> list[Choice]:
    probabilities = [softmax(values) for values in logits]
    balanced = [list(row) for row in probabilities]
    num_experts = len(balanced[0])
    for _ in range(config.num_iterations if learned.training else 0):
        for e in range(num_experts):
            column = math.fsum(row[e] for row in balanced)
            for row in balanced:
                row[e] *= len(balanced) / num_experts / column
        balanced = [[value / math.fsum(row) for value in row] for row in balanced]
    return [
        Choice(best_first(row)[: config.moe_top_k], p, best_first(row), config.renormalize)
        for row, p in zip(balanced, probabilities, strict=True)
    ]


def _expert_choice(config: ExpertChoiceRouterConfig, logits: Matrix, learned: Learned) -> list[Choice]:
    probabilities = [softmax(values) for values in logits]
    num_experts = len(logits[0])
    chosen: list[list[int]] = [[] for _ in logits]
    for expert in range(num_experts):
        wanted = best_first([p[expert] for p in probabilities])
        if learned.training:
            wanted = wanted[: round(len(logits) * config.average_experts / num_experts)]
        else:
            wanted = [token for token in wanted if probabilities[token][expert] >= learned.threshold[expert]]
        for token in wanted:
            chosen[token].append(expert)
    return [Choice(experts, p, best_first(p)) for experts, p in zip(chosen, probabilities, strict=True)]


def admitted(choices: list[Choice], num_sequences: int, capacity: int, overflow: Overflow) -> list[list[int]]:
    """Fill experts up, one position after the other; at a position, one sequence after the other."""
    room = [capacity] * len(choices[0].scores)
    length = len(choices) // num_sequences
    experts: list[list[int]] = [[] for _ in choices]
    for position in range(length):
        for token in range(position, len(choices), length):
            choice = choices[token]
            wishes = list(choice.chosen)
            if overflow is Overflow.next_best:
                wishes = sorted(wishes, key=choice.order.index)
                wishes += [expert for expert in choice.order if expert not in choice.chosen]
            for expert in wishes:
                if room[expert] > 0 and len(experts[token]) < len(choice.chosen):
                    room[expert] -= 1
                    experts[token].append(expert)
    return experts


Network = tuple[Matrix, Matrix]
"""First and second projection, as `nn.Linear` has them."""


def feed_forward(network: Network, activation: Activation, x: Vector) -> Vector:
    up, down = network
    h = product(up, x)
    if activation is Activation.swiglu:
        half = len(h) // 2
        h = [g / (1 + math.exp(-g)) * v for g, v in zip(h[:half], h[half:], strict=True)]
    else:
        h = [0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in h]
    return product(down, h)


def mixture(
    choices: list[Choice],
    experts: list[list[int]],
    tokens: Matrix,
    expert: Callable[[int, Vector], Vector],
    overflow: Overflow | None,
    residual: Callable[[Vector], Vector] | None = None,
) -> Matrix:
    """Return every token's output."""
    outputs = []
    for choice, visited, x in zip(choices, experts, tokens, strict=True):
        if overflow is Overflow.next_best:
            weights = dict(zip(visited, choice.weights(visited), strict=True))
        else:
            weights = dict(zip(choice.chosen, choice.weights(choice.chosen), strict=True))
        y = [0.0] * len(x)
        for e in visited:
            y = [a + weights[e] * b for a, b in zip(y, expert(e, x), strict=True)]
        lost = math.fsum(w for e, w in weights.items() if e not in visited)
        if residual is not None and lost:
            y = [a + lost * b for a, b in zip(y, residual(x), strict=True)]
        outputs.append(y)
    return outputs
