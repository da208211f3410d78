"""Lets Hydra read `conf/` and `sweeps/`: in a checkout or an installed wheel, from any directory, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from ava_exp.config import folders
from ava_exp.config.folders import SWEEP_GROUP
from ava_exp.config.overrides import PLUGIN_GROUPS, PLUGIN_SECTIONS, check_option_name, check_sweep_parameters
from ava_exp.errors import ConfigError

CONFIG_NAME = "config"
"""The file that Hydra starts from, and the only one that may configure Hydra itself."""
Names = list[str]
_SCHEME = "ava-exp"
_PACKAGE = re.compile(r"_global_|_here_|[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*")
_OPEN_HYDRA_KEYS = {"mode", "verbose", *PLUGIN_SECTIONS}


class FolderSource(ConfigSource):
    """The options of every group, as files below `conf/`; those of the group `sweep` are the files of `sweeps/`.

    Raises:
        ConfigError: for a path that leaves its folder, through `..`, a link or otherwise, and for a file that says
            more than a file may (`check_content`).
    """

    @staticmethod
    def scheme() -> str:
        return _SCHEME

    def available(self) -> bool:
        return folders.data_folder("conf").is_dir()

    def is_group(self, config_path: str) -> bool:
        return self._locate(config_path).is_dir()

    def is_config(self, config_path: str) -> bool:
        return self._locate(self._normalize_file_name(config_path)).is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> Names:
        names: Names = [SWEEP_GROUP] if config_path == "" and results_filter is not ObjectType.CONFIG else []
        for path in self._locate(config_path).iterdir():
            if path.suffix in ("", ".yaml"):
                self._list_add_result(names, f"{config_path}/{path.name}".lstrip("/"), path.name, results_filter)
        return sorted(set(names))

    def load_config(self, config_path: str) -> ConfigResult:
        path = self._locate(self._normalize_file_name(config_path))
        if not path.is_file():
            raise ConfigLoadError(f"`{path}` does not exist.")
        try:
            header = self._get_header_dict(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"`{path}` is not UTF-8: {error.reason} at byte {error.start}.") from error
        config = OmegaConf.load(path)
        package = header["package"] or config_path.rpartition("/")[0].replace("/", ".") or "_global_"
        check_content(OmegaConf.to_container(config), package, path)
        return ConfigResult(config=config, path=self.full_path(), provider=self.provider, header=header)

    @staticmethod
    def _locate(config_path: str) -> Path:
        check_option_name(config_path, config_path)
        group, _, rest = config_path.partition("/")
        root = folders.group_folder(SWEEP_GROUP) if group == SWEEP_GROUP else folders.data_folder("conf")
        path = root / (rest if group == SWEEP_GROUP else config_path)
        if not path.resolve().is_relative_to(root.resolve()):
            raise ConfigError(f"`{path}` leads out of `{root}` and is not read.")
        return path


def check_content(content: Any, package: str, path: Path) -> None:
    """Raise `ConfigError` if a file names a `_target_`, an option outside its group, or closed settings of Hydra.

    Where content ends up also depends on the files that include it; so `hydra` is accepted in few, plain forms only.

    Args:
        content: the file as plain values, interpolations unresolved.
        package: where the file asks to be put, `_global_` for the top.
        path: the file, for the message.
    """
    if "_target_" in _keys_of(content):
        raise ConfigError(f"`{path}`: `_target_` is not accepted; components are chosen as options of their group.")
    if not isinstance(content, dict):
        return
    is_start = path == folders.data_folder("conf") / f"{CONFIG_NAME}.yaml"
    for group, option in _defaults(content.get("defaults") or []):
        _check_default(group, option, path, may_set_hydra=is_start)
    if is_start:
        return
    settings = {key: value for key, value in content.items() if key != "defaults"}
    section, _, inner = package.partition(".")
    if not _PACKAGE.fullmatch(package) or "hydra" in inner.split("."):
        raise ConfigError(f"`{path}`: {package!r} is no place for settings.")
    if section == "hydra":
        for part in reversed(inner.split(".")):
            settings = {part: settings}
        _check_hydra_settings(settings, path)
    elif package == "_global_" and "hydra" in settings:
        _check_hydra_settings(settings.pop("hydra"), path)
    if "hydra" in _keys_of(settings):
        raise ConfigError(f"`{path}`: `hydra` stands at the top, of a file with `# @package _global_`.")


def _keys_of(content: Any) -> set[str]:
    if isinstance(content, dict):
        return {str(key) for key in content}.union(*(_keys_of(value) for value in content.values()))
    return set().union(*(_keys_of(item) for item in content)) if isinstance(content, list) else set()


def _defaults(entries: Iterable[Any]) -> Iterable[tuple[str, str]]:
    """Yield (group, option) for every entry of a defaults list; an entry without a group has the group ''."""
    for entry in entries:
        pairs = entry.items() if isinstance(entry, dict) else [("", entry)]
        for group, options in pairs:
            for option in options if isinstance(options, list) else [options]:
                yield str(group), "" if option is None else str(option)


def _check_default(group: str, option: str, path: Path, *, may_set_hydra: bool) -> None:
    name, _, package = (group or option).split(" ")[-1].removeprefix("/").partition("@")
    check_option_name(name, f"{path}: {name}")
    if group:
        check_option_name(option, f"{path}: {group}: {option}")
    is_hydra = name.split("/")[0] == "hydra" and name not in PLUGIN_GROUPS
    if not may_set_hydra and (is_hydra or "hydra" in package or not _PACKAGE.fullmatch(package or "_here_")):
        raise ConfigError(f"`{path}`: `{group or option}` would configure Hydra itself, which only config.yaml may.")


def _check_hydra_settings(settings: Any, path: Path) -> None:
    closed = set(settings) - _OPEN_HYDRA_KEYS if isinstance(settings, dict) else {settings}
    if closed or "${" in str(settings):
        raise ConfigError(
            f"`{path}`: of Hydra's own settings a file may give "
            + ", ".join(f"`hydra.{key}`" for key in sorted(_OPEN_HYDRA_KEYS))
            + ", as plain values."
        )
    sweeper = settings.get("sweeper") or {}
    check_sweep_parameters(sweeper.get("params") or {})


class FolderSearchPath(SearchPathPlugin):
    """Puts `FolderSource` on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="main", path=f"{_SCHEME}://")


def register_source() -> None:
    """Make the folders known to Hydra; calling it twice changes nothing."""
    Plugins.instance().register(FolderSource)
    Plugins.instance().register(FolderSearchPath)
