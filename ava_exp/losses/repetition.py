"""Tokens that would repeat what stands in the context: what a model should not expect unless it is what follows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ava_exp.data.loader import IGNORED

COMPARED_PAIRS = 2**24
"""Pairs of positions that are compared at once, a byte each."""


@dataclass(slots=True)
class TokenSets:
    """A set of tokens for every row: token `ids` (A,) belongs to row `rows` (A,), int64; rows ascend, and no pair is
    there twice."""

    rows: Tensor
    ids: Tensor

    def of(self, span: slice) -> tuple[Tensor, Tensor]:
        """Return the pairs of a run of rows, which are counted from its start. On a GPU this waits for the device."""
        ends = torch.tensor([span.start, span.stop], device=self.rows.device)
        start, stop = torch.searchsorted(self.rows, ends).tolist()
        return self.rows[start:stop] - span.start, self.ids[start:stop]


def last_tokens(input_ids_BT: Tensor, labels_BT: Tensor) -> TokenSets:
    """Return for each of the B·T positions the token just read, unless it is the label or there is none."""
    inputs_N, labels_N = input_ids_BT.flatten(), labels_BT.flatten()
    (rows_A,) = ((inputs_N != labels_N) & (labels_N != IGNORED)).nonzero(as_tuple=True)
    return TokenSets(rows_A, inputs_N[rows_A])


def repeating_tokens(input_ids_BT: Tensor, labels_BT: Tensor, ngram_size: int) -> TokenSets:
    """Return for each of the B·T positions the tokens that would complete an n-gram of the text up to there.

    The label is none of them, and a position without a label has none. With `ngram_size` 1 they are all tokens of the
    context. It compares all pairs of positions of a sequence, some sequences at a time.
    """
    num_sequences, length = input_ids_BT.shape
    step = max(1, COMPARED_PAIRS // length**2)
    rows, ids = [], []
    for start in range(0, num_sequences, step):
        x_BT, y_BT = input_ids_BT[start : start + step], labels_BT[start : start + step]
        sequence, position, repeated = _repetitions(x_BT, y_BT, ngram_size).nonzero(as_tuple=True)
        rows.append((start + sequence) * length + position)
        ids.append(x_BT[sequence, repeated])
    return TokenSets(torch.cat(rows), torch.cat(ids))


def _repetitions(x_BT: Tensor, y_BT: Tensor, ngram_size: int) -> Tensor:
    """Return whether token j would, after position t, repeat the n-gram that it ends: (B, T, T), of t and j.

    An n-gram that stands in the text several times counts where it stands first, and so once.
    """
    length = x_BT.shape[1]
    same_BTT = x_BT[:, :, None] == x_BT[:, None, :]
    repeats_BTT = torch.ones_like(same_BTT).tril()
    for back in range(ngram_size - 1):  # the token before j is that at t, and so on
        repeats_BTT[:, back:, back + 1 :] &= same_BTT[:, : max(0, length - back), : max(0, length - back - 1)]
        repeats_BTT[:, :back] = repeats_BTT[:, :, : back + 1] = False
    is_first_BT = torch.ones_like(x_BT, dtype=torch.bool)
    is_first_BT[:, 1:] = ~(repeats_BTT[:, :-1] & same_BTT[:, 1:]).any(dim=2)
    is_other_BTT = (x_BT[:, None, :] != y_BT[:, :, None]) & (y_BT != IGNORED)[:, :, None]
    return repeats_BTT & is_first_BT[:, None, :] & is_other_BTT
