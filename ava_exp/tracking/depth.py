"""What a record tells of the layers that tokens may skip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OF_EVALUATION = ("processed_share", "predictor_accuracy")
"""Fields of evaluations that have one number for every layer that tokens may skip."""


def depth_statistics(record: Mapping[str, Any]) -> dict[str, float]:
    """Return a record's numbers by name: `layer_1/usage`, `skipped/letters`, `skipped/frequency_4`; none without depth.

    Frequencies count from 0, the rarest fifth of the text, to 4.
    """
    values = {f"layer_{layer}/usage": float(share) for layer, share in enumerate(record.get("layer_usage") or ())}
    for name in OF_EVALUATION:
        for layer, share in zip(record.get("mod_layers") or (), record.get(name) or (), strict=False):
            values[f"layer_{layer}/{name}"] = float(share)
    values |= {
        f"skipped/{kind.replace(' ', '_')}": share for kind, share in (record.get("skipped_by_kind") or {}).items()
    }
    for part, share in enumerate(record.get("skipped_by_frequency") or ()):
        if share is not None:
            values[f"skipped/frequency_{part}"] = float(share)
    return values
