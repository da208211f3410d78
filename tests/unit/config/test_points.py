"""Points composed by setting values on a copy are what Hydra composes, errors included."""

from __future__ import annotations

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf, open_dict

from ava_exp.config.compose import composition_errors_in_one_line
from ava_exp.config.points import PointComposer
from ava_exp.config.source import CONFIG_NAME
from ava_exp.errors import ConfigError

OPTIONS = [
    "model=small",
    "model=tiny",
    "sparsity=dense",
    "router=switch",
    "router=deepseek",
    "schedule=wsd",
    "experiment=ava_small",
    "~experiment",
    "~tracker",
    "tracker=none",
    "data=files",
    "model=smal",
]
VALUES = [
    "model.hidden_size=64",
    "model.num_experts=4",
    "model.vocab_size=${model.hidden_size}",
    "tokenizer.vocab_size=300",
    "model.preset=mine",
    "name='${model.preset}_of_${seed}'",
    "seed=3",
    "seed=4",
    "training.batch_size=null",
    "training.batch_size=7",
    "model.norm=layer",
    "optimizer.betas=[0.8,0.9]",
    "optimizer={learning_rate: 1e-2, weight_decay: 0}",
    "sparsity={num_experts: 3}",
    "sparsity.router.moe_top_k=1",
    "schedule.decay_ratio=0.1",
    "data.paths=[a, b]",
    "+tracker.tags.note=first",
    "++tracker.tags.note=second",
    "stage.prompt='a, b'",
    "precision.training=mixed_bf16",
    "checkpoint.asynchronous=false",
    # what must be refused
    "model.hiden_size=1",
    "seed=many",
    "model.norm=batch",
    "optimizer.betas=3",
    "model.vocab_size=${no.such.key}",
    "seed=null",
    "typo=1",
]


def whole(overrides: list[str]) -> DictConfig:
    """What Hydra composes of the same texts."""
    config = ConfigLoaderImpl(create_config_search_path(None)).load_configuration(CONFIG_NAME, overrides, RunMode.RUN)
    with open_dict(config):
        del config["hydra"]
    return config


def outcome(compose: object, overrides: list[str]) -> object:
    """A configuration as written, as resolved and as objects; or its error, in one line.

    For a name added inside of a section that was left out OmegaConf itself fails, either way.
    """
    try:
        with composition_errors_in_one_line():
            config = compose(overrides)  # type: ignore[operator]
            return OmegaConf.to_yaml(config), OmegaConf.to_yaml(config, resolve=True), OmegaConf.to_object(config)
    except (ConfigError, AttributeError) as error:
        return type(error), str(error)


@pytest.fixture(scope="module")
def composer() -> PointComposer:
    return PointComposer()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    options=st.lists(st.sampled_from(OPTIONS), max_size=2, unique=True),
    values=st.lists(st.sampled_from(VALUES), max_size=5),
    data=st.data(),
)
def test_a_point_is_what_hydra_composes(
    composer: PointComposer, options: list[str], values: list[str], data: st.DataObject
) -> None:
    overrides = data.draw(st.permutations([*options, *values]))
    assert outcome(composer.compose, overrides) == outcome(whole, overrides)


@pytest.mark.parametrize("value", VALUES)
def test_every_value_alone_is_what_hydra_makes_of_it(composer: PointComposer, value: str) -> None:
    assert outcome(composer.compose, [value]) == outcome(whole, [value])


def test_references_follow_the_values_of_their_point(composer: PointComposer) -> None:
    points = [composer.compose(["model=quick", f"model.num_experts={number}"]) for number in (2, 16)]
    assert [point.sparsity.num_experts for point in points] == [2, 16]


def test_a_point_leaves_no_trace_in_the_next(composer: PointComposer) -> None:
    before = OmegaConf.to_yaml(composer.compose(["model=quick"]))
    composer.compose(["model=quick", "optimizer.betas=[0.1,0.2]", "+tracker.tags.note=x", "seed=9"])
    assert OmegaConf.to_yaml(composer.compose(["model=quick"])) == before


def test_only_choices_of_options_are_composed_anew() -> None:
    composer = PointComposer()
    for model in ("tiny", "small"):
        for seed in range(5):
            composer.compose([f"model={model}", f"seed={seed}"])
    assert composer.num_compositions == 2
