"""The experts of a mixture: E feed-forward networks with stacked weights, computed for the tokens sent to each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ava_exp.config.model import Activation, DispatchBackend, MixedActivation, SharedProjection
from ava_exp.errors import ConfigError
from ava_exp.nn.activation import build_mixture, draw_activation
from ava_exp.nn.ffn import num_up_rows
from ava_exp.nn.moe.dispatch import combine, gather, sort_assignments
from ava_exp.nn.moe.exchange import Exchange
from ava_exp.nn.packed import Packable, PackedProduct

NORM_EPSILON = 1e-5
Activate = Callable[[Tensor], Tensor]

logger = logging.getLogger(__name__)


class Experts(Packable):
    """E feed-forward networks with stacked weights: `up` (E, F or 2F, D) and `down` (E, D, F), rows as in `nn.Linear`.

    With `share=up` all have one `up` (F or 2F, D), computed once per token; with `share=down` one `down` (D, F),
    computed once per token from the weighted sum of the hidden activations. `norm` gives each expert an RMS norm of
    its hidden activation, with a scale `norm` (E, F): [shleifer2021normformer] §2.1, there with means and biases.
    `dropout` acts on the hidden activation, on every expert's own while training. A mixture of `mixed_activations` is
    one for all.

    Every expert takes part in the graph, also without tokens: its gradient is then zero, not missing. The stacks may
    hold `num_closed` experts more, after those that tokens can be sent to.

    With an `exchange` they are this rank's share of the experts, and tokens go to those of other ranks, too.
    """

    exchange: Exchange | None = None

    def __init__(
        self,
        num_experts: int,
        dim: int,
        intermediate_size: int,
        activation: Activation,
        dispatch: DispatchBackend = DispatchBackend.auto,
        share: SharedProjection = SharedProjection.none,
        norm: bool = False,
        dropout: float = 0.0,
        mixed_activations: Sequence[MixedActivation] = (),
    ) -> None:
        super().__init__()
        self.num_experts, self.activation, self.dispatch = num_experts, activation, dispatch
        self.num_closed = 0
        self.share, self.dropout = share, dropout
        self.mixture = build_mixture(activation, mixed_activations)
        up, down = (num_up_rows(activation, intermediate_size), dim), (dim, intermediate_size)
        self.up = nn.Parameter(torch.empty(up if share is SharedProjection.up else (num_experts, *up)))
        self.down = nn.Parameter(torch.empty(down if share is SharedProjection.down else (num_experts, *down)))
        self.norm = nn.Parameter(torch.empty(num_experts, intermediate_size)) if norm else None
        self._told = False
        self._packed: tuple[list[PackedProduct], list[PackedProduct]] | None = None

    def forward(self, x_ND: Tensor, expert_ids_Nk: Tensor, weights_Nk: Tensor, ragged: bool = False) -> Tensor:
        """Return y_n = Σ_k weight_nk · expert_nk(x_n), (N, D) in the format of `x_ND`.

        `expert_ids_Nk` is int64 in [0, E). Only if `ragged` some may be -1: an assignment that does not exist, adds
        nothing, and whose weight gets a gradient of zero whatever its value. On a GPU, `ragged` waits for the device.
        Raises `ConfigError` when the grouped back end is asked for and cannot compute this format or these widths.
        """
        if self.exchange is not None:
            return self._on_all_ranks(self.exchange, x_ND, expert_ids_Nk, weights_Nk, ragged)
        return self._here(x_ND, expert_ids_Nk, weights_Nk, ragged)

    def _on_all_ranks(
        self, exchange: Exchange, x_ND: Tensor, expert_ids_Nk: Tensor, weights_Nk: Tensor, ragged: bool
    ) -> Tensor:
        """Send rows to the ranks that hold their experts; weights are applied to what comes back."""
        rows = sort_assignments(expert_ids_Nk, exchange.num_ranks * self.num_experts, ragged, fill=False)
        visits = exchange.meet(rows.ends.long().diff(prepend=rows.ends.new_zeros(1, dtype=torch.int64)))
        x_RD = visits.send(gather(x_ND, rows))
        ids_R1 = visits.experts[:, None]
        h_RD = self._here(x_RD, ids_R1, x_RD.new_ones(ids_R1.shape), ragged=False)
        return combine(visits.send_back(h_RD), rows.weights(weights_Nk), rows)

    def _here(self, x_ND: Tensor, expert_ids_Nk: Tensor, weights_Nk: Tensor, ragged: bool) -> Tensor:
        activate = draw_activation(self.activation, self.mixture)
        if self._packed is not None and not torch.is_grad_enabled():
            return self._with_packed(x_ND, expert_ids_Nk, weights_Nk, activate)
        assert ragged or x_ND.device.type != "cpu" or bool((expert_ids_Nk >= 0).all()), "-1 only if ragged"
        if not len(x_ND) or not self._use_grouped(x_ND):  # a grouped product of no rows has no backward
            return self._one_by_one(x_ND, expert_ids_Nk, weights_Nk, activate)
        if expert_ids_Nk.shape[1] == self.num_experts and not ragged:
            return self._all_for_all(x_ND, expert_ids_Nk, weights_Nk, activate)
        return self._sorted(x_ND, expert_ids_Nk, weights_Nk, ragged, activate)

    def _one_by_one(self, x_ND: Tensor, expert_ids_Nk: Tensor, weights_Nk: Tensor, activate: Activate) -> Tensor:
        """Compute one expert after the other, in any format: the reference."""
        share_up, share_down = self.share is SharedProjection.up, self.share is SharedProjection.down
        hidden_NF = activate(F.linear(x_ND, self.up)) if share_up else x_ND
        ups = () if share_up else self.up.unbind()  # one gradient for the stack, where indexing makes E of its size
        downs = () if share_down else self.down.unbind()
        width = self.down.shape[-1] if share_down else x_ND.shape[1]
        y = x_ND.new_zeros(x_ND.shape[0], width, dtype=torch.promote_types(x_ND.dtype, weights_Nk.dtype))
        for expert in range(self.num_experts):
            token, choice = (expert_ids_Nk == expert).nonzero(as_tuple=True)
            h = hidden_NF[token]
            if ups:
                h = activate(F.linear(h, ups[expert]))
            if self.norm is not None:
                h = F.rms_norm(h, h.shape[1:], self.norm[expert], NORM_EPSILON)
            h = self._drop(h)
            if downs:
                h = F.linear(h, downs[expert])
            y = y.index_add(0, token, (h * weights_Nk[token, choice, None]).to(y.dtype))
        y = y.to(x_ND.dtype)
        return F.linear(y, self.down) if share_down else y

    def _sorted(
        self, x_ND: Tensor, expert_ids_Nk: Tensor, weights_Nk: Tensor, ragged: bool, activate: Activate
    ) -> Tensor:
        """Sort assignments by expert and multiply all groups at once; fp32, bf16 or fp16."""
        up, down, norm = self._stacks()
        rows = sort_assignments(expert_ids_Nk, self.num_experts, ragged)
        if self.share is SharedProjection.up:
            h_RF = gather(activate(F.linear(x_ND, up)), rows)
        else:
            h_RF = activate(F.grouped_mm(gather(x_ND, rows), up.transpose(1, 2), offs=rows.ends))
        if norm is not None:
            # a product, not a gather: its backward is one, too, and sums in fp32
            chosen_RE = F.one_hot(rows.experts(), self.num_experts).to(h_RF.dtype)
            h_RF = F.rms_norm(h_RF, h_RF.shape[1:], eps=NORM_EPSILON) * (chosen_RE @ norm)
        h_RF = self._drop(h_RF)
        weights_A = rows.weights(weights_Nk)
        if self.share is SharedProjection.down:
            return F.linear(combine(h_RF, weights_A, rows), down)
        return combine(F.grouped_mm(h_RF, down.transpose(1, 2), offs=rows.ends), weights_A, rows)

    def _all_for_all(self, x_ND: Tensor, expert_ids_Nk: Tensor, weights_Nk: Tensor, activate: Activate) -> Tensor:
        """Compute every expert for every token: two plain products, with the weights applied in between."""
        up, down, norm = self._stacks()
        num_tokens = x_ND.shape[0]
        weights_NE = torch.zeros_like(weights_Nk).scatter_add(1, expert_ids_Nk, weights_Nk)
        h = F.linear(x_ND, up.flatten(0, -2)).view(num_tokens, -1, up.shape[-2])
        h_NEF = activate(h)  # one for all with `share=up`
        if norm is not None:
            h_NEF = F.rms_norm(h_NEF, h_NEF.shape[2:], eps=NORM_EPSILON) * norm
        h_NEF = self._drop(h_NEF.expand(-1, self.num_experts, -1))
        if self.share is SharedProjection.down:
            return F.linear(torch.einsum("ne,nef->nf", weights_NE.to(h_NEF.dtype), h_NEF), down)
        h_NEF = h_NEF * weights_NE[:, :, None].to(h_NEF.dtype)
        return F.linear(h_NEF.flatten(1), down.transpose(0, 1).flatten(1))

    def pack(self) -> None:
        """Pack every expert's weights, for inference on a CPU."""
        up, down, _ = self._stacks()
        ups, downs = ([weight] if weight.ndim == 2 else weight.unbind() for weight in (up, down))
        self._packed = [PackedProduct(w) for w in ups], [PackedProduct(w) for w in downs]

    def unpack(self) -> None:
        """Forget the packed weights."""
        self._packed = None

    def _with_packed(self, x_ND: Tensor, expert_ids_Nk: Tensor, weights_Nk: Tensor, activate: Activate) -> Tensor:
        """Compute the experts that have tokens, one after the other: the fastest way on a CPU, without gradients."""
        assert self._packed is not None
        share_up, share_down = self.share is SharedProjection.up, self.share is SharedProjection.down
        shared_up, shared_down = self._packed[0][0], self._packed[1][0]
        hidden_NF = activate(shared_up(x_ND)) if share_up else x_ND
        width = self.down.shape[-1] if share_down else x_ND.shape[1]
        wide = torch.promote_types(x_ND.dtype, weights_Nk.dtype)
        if x_ND.shape[0] == 1:  # nothing to sort
            experts = expert_ids_Nk[0].tolist()
            outputs = [self._one_packed(expert, hidden_NF, activate) for expert in experts if expert >= 0]
            weights_k1 = weights_Nk[0, :, None]
            if len(outputs) < len(experts):
                weights_k1 = weights_k1[expert_ids_Nk[0] >= 0]
            y = (torch.cat(outputs) * weights_k1).sum(dim=0, keepdim=True) if outputs else x_ND.new_zeros(1, width)
        else:
            experts_A, order_A = expert_ids_Nk.flatten().sort(stable=True)
            numbers = torch.bincount(experts_A + 1, minlength=self.num_experts + 1).tolist()
            order_A = order_A[numbers[0] :]  # without the visits of no expert, -1
            token_A = order_A // expert_ids_Nk.shape[1]
            groups = enumerate(torch.split(hidden_NF[token_A], numbers[1:]))
            outputs = [self._one_packed(expert, rows, activate) for expert, rows in groups if rows.shape[0]]
            y = x_ND.new_zeros(x_ND.shape[0], width, dtype=wide)
            if outputs:
                y.index_add_(0, token_A, (torch.cat(outputs) * weights_Nk.flatten()[order_A, None]).to(wide))
        y = y.to(x_ND.dtype)
        return shared_down(y) if share_down else y

    def _one_packed(self, expert: int, h_RF: Tensor, activate: Activate) -> Tensor:
        """Return what an expert makes of rows, apart from projections that all experts share."""
        assert self._packed is not None
        ups, downs = self._packed
        if self.share is not SharedProjection.up:
            h_RF = activate(ups[expert](h_RF))
        if self.norm is not None:
            h_RF = F.rms_norm(h_RF, h_RF.shape[1:], self.norm[expert], NORM_EPSILON)
        return h_RF if self.share is SharedProjection.down else downs[expert](h_RF)

    def stacks(self) -> list[str]:
        """Return the names of the parameters that have an entry for every expert."""
        stacked = [name for name, _ in self.named_parameters(recurse=False)]
        return [name for name in stacked if self.share is SharedProjection.none or name != self.share.value]

    def _stacks(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return `up`, `down` and `norm` of the experts that tokens can be sent to."""
        if not self.num_closed:
            return self.up, self.down, self.norm
        up = self.up if self.share is SharedProjection.up else self.up[: self.num_experts]
        down = self.down if self.share is SharedProjection.down else self.down[: self.num_experts]
        return up, down, None if self.norm is None else self.norm[: self.num_experts]

    def _drop(self, h: Tensor) -> Tensor:
        return F.dropout(h, self.dropout, self.training) if self.dropout > 0 else h

    def _use_grouped(self, x_ND: Tensor) -> bool:
        if self.dispatch is DispatchBackend.loop:
            return False
        obstacle = self._obstacle(x_ND)
        if obstacle is None:
            return True
        if self.dispatch is DispatchBackend.grouped:
            raise ConfigError(
                f"`sparsity.dispatch` cannot be `grouped` here: {obstacle}. Use `sparsity.dispatch=auto`."
            )
        if not self._told:
            logger.warning("experts run one by one: %s. `sparsity.dispatch=grouped` makes this an error.", obstacle)
            self._told = True
        return False

    def _obstacle(self, x_ND: Tensor) -> str | None:
        """Return why the grouped product cannot serve these tensors, or None when it can."""
        if x_ND.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"grouped products are computed in fp32, bf16 and fp16, not in {x_ND.dtype}"
        row_bytes = [size * x_ND.element_size() for size in (*self.up.shape[-2:], self.down.shape[-1])]
        if any(size % 16 for size in row_bytes):
            return f"grouped products need rows that are multiples of 16 bytes, but they have {row_bytes} bytes"
        return None
