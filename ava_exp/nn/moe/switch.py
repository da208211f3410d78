"""Switch routing: one expert for a token."""

from __future__ import annotations

from ava_exp.nn.moe.router import TokenChoiceRouter


class SwitchRouter(TokenChoiceRouter):
    """Every token goes to its most probable expert, weighted by that probability [fedus2022switch] §2.1.

    The paper has a capacity factor and drops what exceeds it: `sparsity.capacity_factor` and `sparsity.overflow`,
    which are a matter of dispatch and not of this router.
    """

    moe_top_k = 1
