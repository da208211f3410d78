"""The text of `--help`: every group with its options, the flags, examples."""

from __future__ import annotations

from omegaconf import OmegaConf

from ava_exp.config import folders

_TEXT = """\
ava_exp trains sparse language models. A run is composed from one option of each group, and any value can be changed.

usage: python -m ava_exp [group=option ...] [key=value ...] [flags]

Groups and their options (* is taken when nothing is said; `sparsity` and `router` come with the model):
{groups}

Flags:
  --cfg job            print the composed configuration, every key with its value, instead of running
  --cfg job --resolve  the same with references resolved
  --info defaults-tree print which files the configuration is composed from
  -m, --multirun       run every combination of `key=value,value`, or the points of `sweep=NAME`
  -sc install=bash     print the shell code that completes groups, options and keys (also zsh, fish)
  --help, --version    print this, or the version

Examples:
  python -m ava_exp                                        train the quick model on embedded text
  python -m ava_exp debug=default                          a few steps of a very small one
  python -m ava_exp model=small sparsity=dense precision=bf16 budget.steps=1000
  python -m ava_exp data=files 'data.paths=[notes.txt, books/]'
  python -m ava_exp stage=plan model=large                 parameters, FLOPs and memory, without training
  python -m ava_exp stage=generate 'stage.prompt="import os"'
  python -m ava_exp -m seed=1,2,3 optimizer.learning_rate=1e-3,3e-3
  python -m ava_exp -m sweep=router_ablation sweep.num_parallel=2
"""


def help_text() -> str:
    """Return the help, made from the folders as they are."""
    chosen = _default_options()
    rows = []
    for group in folders.group_names():
        names = [f"{name}*" if name == chosen.get(group) else name for name in folders.option_names(group)]
        rows += [f"  {group:<12} {', '.join(names)}"] if names else []
    return _TEXT.format(groups="\n".join(rows))


def _default_options() -> dict[str, str]:
    """Return the option that `conf/config.yaml` takes of each group."""
    entries = OmegaConf.to_container(OmegaConf.load(folders.data_folder("conf") / "config.yaml"))
    assert isinstance(entries, dict)
    pairs = [pair for entry in entries["defaults"] if isinstance(entry, dict) for pair in entry.items()]
    return {group: option for group, option in pairs if option is not None}
