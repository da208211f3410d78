"""Everything that plain Hydra would take from a command line and this project must not."""

from __future__ import annotations

import pytest

from ava_exp.config.compose import compose
from ava_exp.config.overrides import check_overrides
from ava_exp.errors import ConfigError

HARMLESS = [
    "model=small",
    "experiment=ava_small",
    "sweep=learning_rate",
    "hydra/launcher=basic",
    "hydra.verbose=true",
    "hydra.launcher.anything=3",
    "hydra.sweeper.max_batch_size=2",
    "~experiment",
    "~tracker=mlflow",
    "model.hidden_size=128",
    "model={hidden_size: 128}",
    "stage.prompt='${x} ../.. /etc'",
    "data.paths=[../books, /data/*.txt]",
    "+tracker.tags.note=first",
    "++tracker.tags.note=first",
    "optimizer.betas=[0.9,0.99]",
]


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_overrides_pass(text: str) -> None:
    check_overrides([text], may_sweep=False)


@pytest.mark.parametrize(
    "text",
    [
        "model=../../secret",
        "model=small/../../secret",
        "model=/etc/passwd",
        "model=[small,/etc/passwd]",
        "model='../secret'",
        "model=a\\\\..\\\\b",
        "model=${oc.env:HOME}",
        "hydra/launcher=../../../secret",
        "sweep=../secret",
    ],
)
def test_an_option_is_never_a_path(text: str) -> None:
    with pytest.raises(ConfigError, match="not a path"):
        check_overrides([text], may_sweep=False)


@pytest.mark.parametrize("text", ["model=small,../secret", "model=choice(small,/secret)", "model=glob(../*)"])
def test_an_option_is_never_a_path_in_a_sweep_either(text: str) -> None:
    with pytest.raises(ConfigError, match="not a path"):
        check_overrides([text], may_sweep=True)


@pytest.mark.parametrize(
    "text",
    [
        "hydra.searchpath=[file:///tmp]",
        "hydra.callbacks.x.y=1",
        "+hydra.callbacks.x={y: 1}",
        "+hydra={callbacks: {x: {y: 1}}}",
        "hydra={verbose: true}",
        "hydra.run.dir=/tmp/elsewhere",
        "hydra.sweep.dir=/tmp/elsewhere",
        "hydra.output_subdir=x",
        "hydra.job.chdir=true",
        "hydra.job.env_set={LD_PRELOAD: x}",
        "hydra.job_logging.formatters={x: 1}",
        "hydra.launcher={x: 1}",
        "hydra.launcher=null",
        "hydra.mode=MULTIRUN",
        "hydra.verbose.x=1",
        "hydra/callbacks=x",
        "+hydra/callbacks=x",
        "hydra/job_logging=stdout",
    ],
)
def test_hydra_itself_is_closed(text: str) -> None:
    with pytest.raises(ConfigError, match="of Hydra's own settings only"):
        check_overrides([text], may_sweep=False)


@pytest.mark.parametrize(
    "text",
    [
        "model._target_=os.system",
        "+model._target_=os.system",
        "hydra.launcher._target_=os.system",
        "+hydra.callbacks.x={_target_: torch.load, f: x}",
        "stage={_target_: builtins.open}",
        "+tracker.tags={_target_: os.system}",
        "hydra.sweeper.params={model._target_: x}",
    ],
)
def test_targets_are_refused_wherever_they_stand(text: str) -> None:
    with pytest.raises(ConfigError, match="`_target_` is not accepted"):
        check_overrides([text], may_sweep=False)


@pytest.mark.parametrize("text", ["hydra.sweeper.params={hydra.searchpath: 1}", "+hydra.sweeper.params.seed='1,2'"])
def test_sweeps_are_not_written_as_settings_of_the_sweeper(text: str) -> None:
    with pytest.raises(ConfigError, match=r"sweep with `-m key=value,value`"):
        check_overrides([text], may_sweep=True)


def test_launcher_settings_are_plain_values() -> None:
    with pytest.raises(ConfigError, match="not interpolations"):
        check_overrides(["hydra.launcher.x=${oc.env:HOME}"], may_sweep=False)


@pytest.mark.parametrize("text", ["+typo=1", "+model.typo=1", "++optimizer.typo=1", "+model={typo: 1}", "+a/b=c"])
def test_no_key_is_added(text: str) -> None:
    with pytest.raises(ConfigError, match=r"no key can be added|is not a group"):
        check_overrides([text], may_sweep=False)


@pytest.mark.parametrize("text", ["+experiment=ava_small", "+model=small", "+hydra/launcher=basic"])
def test_a_group_is_chosen_without_a_plus(text: str) -> None:
    with pytest.raises(ConfigError, match=f"write `{text[1:]}`"):
        check_overrides([text], may_sweep=False)


@pytest.mark.parametrize("text", ["~optimizer.learning_rate", "~seed", "~typo"])
def test_keys_are_not_removed(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be removed"):
        check_overrides([text], may_sweep=False)


def test_a_section_that_is_left_out_has_no_keys() -> None:
    with pytest.raises(
        ConfigError, match=r"`\+tracker\.tags\.x=1` sets a key of `tracker`, which `~tracker` leaves out"
    ):
        compose(["~tracker", "+tracker.tags.x=1"])
    assert compose(["~launcher", "launcher.grace_s=5"]).launcher.grace_s == 5, "this one has a default"


@pytest.mark.parametrize("text", ["model=1", "model=null", "model=", "experiment=true"])
def test_a_group_takes_the_name_of_an_option(text: str) -> None:
    with pytest.raises(ConfigError, match="takes one of"):
        check_overrides([text], may_sweep=False)


def test_options_stay_in_their_place() -> None:
    with pytest.raises(ConfigError, match=r"leave `@hydra\.launcher` out"):
        check_overrides(["model@hydra.launcher=small"], may_sweep=False)


def test_several_values_need_multirun() -> None:
    check_overrides(["seed=1,2"], may_sweep=True)
    with pytest.raises(ConfigError, match="add `-m`"):
        check_overrides(["seed=1,2"], may_sweep=False)


def test_the_python_interface_is_as_strict_as_the_command_line() -> None:
    with pytest.raises(ConfigError, match="not a path"):
        compose(["model=../../secret"])
