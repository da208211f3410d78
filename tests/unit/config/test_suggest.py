"""The one line that a wrong override is answered with."""

from __future__ import annotations

import pytest

from ava_exp.config.compose import compose
from ava_exp.config.schema import all_keys
from ava_exp.errors import ConfigError


def complaint(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("modle=small", "`modle` does not exist: did you mean `model` or `mod`?"),
        ("expermient=x", "`expermient` does not exist: did you mean `experiment`"),
        ("weight_decay=1", "`weight_decay` does not exist: did you mean `optimizer.weight_decay`?"),
        ("model=smal", "`model` has no option `smal`: did you mean `small` or `cpu_small`?"),
        (
            "experiment=nothing_like_it",
            "`experiment` has no option `nothing_like_it`: it can be `ava_8gb`, `ava_fast`,",
        ),
        ("seed=1.5", "`seed` must be a whole number, but is 1.5 instead."),
        ("budget.steps=1e6", "`budget.steps` must be a whole number or `null`, but is 1000000.0 instead."),
        ("optimizer.learning_rate=abc", "`optimizer.learning_rate` must be a number, but is 'abc' instead."),
        ("model.bias=maybe", "`model.bias` must be `true` or `false`, but is 'maybe' instead."),
        ("model.norm=group", "`model.norm` must be one of `rms`, `layer`, but is 'group' instead."),
        ("optimizer.betas=[a,1]", "`optimizer.betas[0]` must be a number, but is 'a' instead."),
        ("optimizer.betas=3", "`optimizer.betas` must be a list, but is 3 instead."),
        ("training=3", "`training` must be a section with keys of its own, but is 3 instead."),
        ("schedule.decay_ratio=0.1", "is not a key of the chosen option, but of `schedule=wsd`."),
        ("attention.num_level=2", "did you mean `attention.num_levels`? That needs `attention=multi_level`."),
        ("stage.promt=x", "`stage.promt` does not exist: `stage` has no keys here."),
        ("tracker.tags.a=b", "`tracker.tags.a` is new in a mapping: write `+tracker.tags.a=…`."),
        ("data=files", "`data.paths` must be given"),
        ("~tracker", "`tracker` must be given"),
        ("seed=${model.nothing}", "`seed` cannot be resolved: Interpolation key 'model.nothing' not found."),
        ("foo", "`foo` is not `key=value`"),
        ("=3", "`=3` is not `key=value`"),
        ("name=a(b", "if the value is text, quote it twice: 'name=\"a(b\"'."),
        ("model/x=small", "`model/x` is not a group: did you mean `model` or `mod`?"),
    ],
)
def test_one_line_says_what_is_wrong_and_what_would_be_right(override: str, expected: str) -> None:
    assert expected in complaint(override)


def test_the_nearest_key_of_the_section_comes_first() -> None:
    assert "did you mean `model.hidden_size`" in complaint("model.hiden_size=1")
    assert "did you mean `model.hidden_size`" in complaint("+model.hiden_size=1")


def test_a_key_of_another_option_is_meant_where_the_chosen_one_has_none_like_it() -> None:
    assert "did you mean `schedule.num_cycles`?" in complaint("schedule.num_cyclse=3")


def test_without_a_near_key_all_are_listed() -> None:
    assert "there is `optimizer.learning_rate`, `optimizer.weight_decay`" in complaint("optimizer.qqq=1")


def test_a_group_that_nothing_uses() -> None:
    assert "the group `router` has no part in this run" in complaint("sparsity=dense", "router=topk")


@pytest.mark.parametrize("key", [key for key in all_keys() if key.count(".") == 1][::6])
def test_a_letter_too_many_is_always_recognised(key: str) -> None:
    text = complaint(f"{key}x=1")
    assert f"`{key}`" in text or "is not a key of the chosen option" in text or "has no keys here" in text
