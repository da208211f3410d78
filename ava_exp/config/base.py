"""What every configuration dataclass shares: how a component is built from its own configuration.

A configuration's fields are its component's constructor keywords; what is known only at run time (`dim`, `device`)
is passed to `build`. The component is named by a class constant, so that no text from a user is ever imported.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, ClassVar


@dataclasses.dataclass(kw_only=True, slots=True)
class ComponentConfig:
    """A configuration whose component is built by calling `builds` ('package.module:Name')."""

    builds: ClassVar[str] = ""
    runtime_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that describe the component to a reader and are not constructor keywords."""

    def component(self) -> Any:
        """Import what this configuration describes: a class, or a function."""
        module, _, name = self.builds.partition(":")
        return getattr(importlib.import_module(module), name)

    def build(self, **runtime: Any) -> Any:
        """Construct the component from this configuration and the values known only at run time."""
        own = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in self.runtime_fields
        }
        return self.component()(**own, **runtime)
