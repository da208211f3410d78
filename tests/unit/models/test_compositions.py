"""Whatever is composed, inference is causal, and decoding with a cache is the full forward pass.

Compositions are drawn at random from every option of the groups that make a decoder, so that a new option takes part
without a line here. Each is small and computed in float64.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ava_exp.config.architecture import Architecture
from ava_exp.config.compose import compose
from ava_exp.config.folders import option_names
from ava_exp.config.model import Activation, ModelConfig, Norm
from ava_exp.config.run import RunConfig
from ava_exp.models.arithmetic import count_parameters
from ava_exp.models.decoder import Decoder, build_model
from tests.unit.nn.routing_cases import NO_CAPACITY, teach

NUM_COMPOSITIONS = 240
VOCABULARY, LENGTH = 61, 17


@dataclass(frozen=True)
class Draw:
    """One composition: options by group, and values of the model."""

    number: int
    options: tuple[tuple[str, str], ...]
    model: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        words = [f"{group}={option}" for group, option in self.options]
        return f"{self.number}: " + " ".join([*words, *(f"{key}={value}" for key, value in self.model)])


def draw(number: int) -> Draw:
    generator = random.Random(number)
    options = {group: generator.choice(option_names(group)) for group in ("attention", "mod", "prediction")}
    options["sparsity"] = generator.choice(option_names("sparsity"))
    if options["sparsity"] != "dense":
        refused = NO_CAPACITY if options["sparsity"] == "ava_moe" else set()
        options["router"] = generator.choice([name for name in option_names("router") if name not in refused])
    heads, kv_heads = generator.choice([(4, 4), (4, 2), (2, 1)])
    model = {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "num_layers": generator.choice([2, 3]),
        "activation": generator.choice(list(Activation)),
        "norm": generator.choice(list(Norm)),
        "tie_embeddings": generator.choice([True, False]),
        "bias": generator.choice([True, False]),
    }
    return Draw(number, tuple(options.items()), tuple(model.items()))


@functools.cache
def composed(*overrides: str) -> RunConfig:
    return compose(["~local", *overrides])


def architecture_of(drawn: Draw) -> Architecture:
    options = dict(drawn.options)
    sparsity = [f"sparsity={options['sparsity']}"]
    if "router" in options:
        sparsity.append(f"router={options['router']}")
    model = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.3,
        **dict(drawn.model),
    )
    return Architecture(
        model,
        composed(f"attention={options['attention']}").attention,
        composed(*sparsity).sparsity,
        composed(f"mod={options['mod']}").mod,
        composed(f"prediction={options['prediction']}").prediction,
    )


def build(drawn: Draw) -> Decoder:
    """Return a decoder at inference in which everything that is learned has been moved."""
    model = build_model(architecture_of(drawn), seed=drawn.number, dtype=torch.float64)
    generator = torch.Generator().manual_seed(drawn.number)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for layer in model.moe_layers():
        teach(layer.router)
    return model.eval()


def some_ids(number: int, batch: int = 2) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(number))


def chunks(number: int, stop: int) -> list[tuple[int, int]]:
    """Cut the positions up to `stop` in one to many pieces."""
    generator = random.Random(number)
    cuts = sorted(generator.sample(range(1, stop), generator.randint(0, stop - 1)))
    return list(zip([0, *cuts], [*cuts, stop], strict=True))


def test_parameters_are_counted_in_closed_form() -> None:
    for drawn in DRAWS:
        built = sum(parameter.numel() for parameter in build(drawn).parameters())
        assert count_parameters(architecture_of(drawn)).total == built, drawn


DRAWS = [draw(number) for number in range(NUM_COMPOSITIONS)]


@pytest.mark.parametrize("drawn", DRAWS, ids=str)
@torch.no_grad()
def test_inference_is_causal_and_decoding_is_the_forward_pass(drawn: Draw) -> None:
    model, ids = build(drawn), some_ids(drawn.number)
    whole = model(ids).logits
    position = random.Random(drawn.number).randrange(1, LENGTH)
    changed = ids.clone()
    changed[0, position] = (changed[0, position] + 1) % VOCABULARY
    moved = model(changed).logits
    torch.testing.assert_close(moved[0, :position], whole[0, :position], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved[1], whole[1], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(moved[0, position], whole[0, position])

    cache = model.new_cache(batch_size=2, capacity=LENGTH)
    # Read a wrong continuation first, then take it back: what is kept must not remember it.
    model(changed[:, :position], cache)
    model(changed[:, position:], cache)
    cache.truncate(position)
    decoded = [whole[:, :position]]
    decoded += [model(ids[:, start:stop], cache).logits for start, stop in pieces(drawn.number, position)]
    torch.testing.assert_close(torch.cat(decoded, dim=1), whole, rtol=1e-8, atol=1e-8)


def pieces(number: int, start: int) -> list[tuple[int, int]]:
    return [(start + first, start + last) for first, last in chunks(number, LENGTH - start)]


@pytest.mark.parametrize("drawn", DRAWS[::4], ids=str)
@torch.no_grad()
def test_prompts_of_a_batch_do_not_see_each_other(drawn: Draw) -> None:
    """Prompts of different lengths, padded at the end, and a sequence that leaves: each is as if it were alone."""
    model, ids = build(drawn), some_ids(drawn.number, batch=3)
    alone = [model(ids[row : row + 1]).logits[0] for row in range(3)]
    lengths = torch.tensor([5, 9, 2])
    cache = model.new_cache(batch_size=3, capacity=LENGTH)
    padded = ids[:, :9].clone()
    logits = model(padded, cache, counts_B=lengths).logits
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(logits[row, :length], alone[row][:length], rtol=1e-8, atol=1e-8)
    kept = torch.tensor([2, 0])
    cache.select(kept)
    for step in range(3):
        at = lengths[kept] + step
        logits = model(ids[kept, at][:, None], cache).logits
        for row, sequence in enumerate(kept.tolist()):
            expected = alone[sequence][int(at[row])]
            torch.testing.assert_close(logits[row, 0], expected, rtol=1e-8, atol=1e-8)
