"""Rows of the training stream, made from prepared samples and the row plan whenever they are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.data.packing import RowPlan
from paceline.data.split import PreparedSplit
from paceline.errors import DataError
from paceline.schema.limits import RowSizes
from paceline.schema.rows import Row


class RowSource:
    """The stream of epochs, end to end; any position can be asked for, by any rank, in any order."""

    def __init__(self, split: PreparedSplit, plan: RowPlan, seed: int) -> None:
        """Combine samples with the plan that was built from their lengths.

        Args:
            split: the samples.
            plan: their row plan.
            seed: the one the plan was built with; it also orders the epochs.

        Raises:
            DataError: the plan is of other data, or was built with another seed.
        """
        if plan.num_tokens != int(split.lengths.sum()):
            raise DataError(
                f"the row plan holds {plan.num_tokens} tokens, {split.path} has {int(split.lengths.sum())}: "
                "they do not belong together; prepare the data again"
            )
        if plan.seed != seed:
            raise DataError(f"the row plan was built with seed {plan.seed}, rows are asked for with seed {seed}")
        self._split = split
        self._plan = plan
        self._order = (-1, np.zeros(0, np.int64))

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return self._plan.num_rows

    def sizes(self, num_positions: int) -> RowSizes:
        """The largest of the rows at the first positions of the stream."""
        rows = self._plan.row_order(0)[:num_positions]  # each row once before one comes again
        return self.sizes_of(rows)

    def sizes_of(self, row_ids: Sequence[int] | np.ndarray) -> RowSizes:
        """The largest of these rows of the plan."""
        if not len(row_ids):
            return RowSizes()
        lengths, starts = self._plan.lengths, self._plan.offsets[:-1]
        documents, tokens = np.maximum.reduceat(lengths, starts), np.add.reduceat(lengths, starts)
        return RowSizes(int(documents[row_ids].max()), int(tokens[row_ids].max()))

    def row(self, position: int) -> Row:
        """The row at `position` (>= 0) of the stream of all epochs.

        Raises:
            DataError: there are no rows at all.
        """
        if not self.num_rows:
            raise DataError(f"{self._split.path} has no samples, so there are no rows")
        epoch, place = divmod(position, self.num_rows)
        return self.planned_row(int(self._epoch_order(epoch)[place]), position, epoch)

    def planned_row(self, row_id: int, position: int, epoch: int = 0) -> Row:
        """The row `row_id` (0..num_rows-1) of the plan, which is the same at every position and in every epoch."""
        tokens, spans, cuts, sample_ids, pieces = [], [], [], [], []
        documents = [0]
        for index, start, end, piece in self._plan.row_documents(row_id):
            sample = self._split.sample(index)
            inside = np.clip(sample.spans, start, end)
            kept = inside[:, 0] < inside[:, 1]
            tokens.append(sample.tokens[start:end])
            spans.append(inside[kept] + (documents[-1] - start))
            cuts.append(sample.spans[kept, 1] > end)
            sample_ids.append(sample.sample_id)
            pieces.append(piece)
            documents.append(documents[-1] + end - start)
        return Row(
            position=position,
            epoch=epoch,
            row_id=row_id,
            tokens=np.concatenate(tokens),
            documents=np.array(documents, np.int32),
            spans=np.concatenate(spans).astype(np.int32),
            span_cut=np.concatenate(cuts),
            sample_ids=np.array(sample_ids, np.int64),
            pieces=np.array(pieces, np.int32),
        )

    def _epoch_order(self, epoch: int) -> np.ndarray:
        # Replaced in one assignment: two threads may ask at once, and at worst draw the same order twice.
        known, order = self._order
        if known != epoch:
            order = self._plan.row_order(epoch)
            self._order = (epoch, order)
        return order
