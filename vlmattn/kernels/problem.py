"""One attention call, as every backend takes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vlmattn.kernels.edit import NO_EDIT, AttentionEdit
from vlmattn.kernels.visibility import Mask, Visibility


@dataclass(frozen=True, eq=False)
class Problem:
    """What attends to what, what the unedited model sees, and what the edit changes.

    Attributes:
        query: ``[batch, heads, query, dim]``, after the rotation.
        key, value: ``[batch, kv_heads, key, dim]``; ``heads`` is a multiple of ``kv_heads`` (grouped-query attention),
            and the values may be of another size.
        visibility: what the unedited model sees, and which keys are padding.
        scale: factor of the dot products, usually ``dim ** -0.5``.
        edit: what to change.
        softcap: scores become ``softcap tanh(s / softcap)`` before the edit; None = they stay.
        sinks: float ``[heads]``, the model's scores of one more key per head whose value is zero; None = none.
        dropout: probability, 0..1, of dropping an attention weight (training only).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visibility: Visibility
    scale: float
    edit: AttentionEdit = NO_EDIT
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0

    @property
    def rows(self) -> int:
        """Query rows."""
        return self.query.shape[2]

    def shifted(self) -> Problem:
        """The same with the edit's shift added to the queries."""
        if self.edit.shift is None:
            return self
        query, edit = self.edit.shifted(self.query)
        return replace(self, query=query, edit=edit)

    def mask(self, start: int, stop: int) -> Mask | None:
        """What the query rows ``start:stop`` see; None = everything."""
        see = self.visibility
        if self.rows == 1 and (see.one_row is not None or see.mask is None):
            return see.one_row
        return see.of_rows(start, stop, self.key.shape[2], self.query.device)
