"""Text that a model writes itself: rows begin as the corpus's, and what was written is learned."""

import numpy as np

from nemotron_jax.data.packing import Row, make_batch
from nemotron_jax.posttraining.own_text import _row, beginnings

EOS = 2


def test_rows_begin_with_their_last_document_without_its_end() -> None:
    rows = {
        (5, 6, 7, 8, 9, 9): ((1, 1, 1, 1, 1, 1), (5, 6, 7, 8)),
        (5, EOS, 7, 8, 9, 9): ((1, 1, 2, 2, 2, 2), (7, 8)),
        (5, 6, 7, EOS, 9, 9): ((1, 1, 1, 1, 2, 2), (5, 6, 7)),
        (5, 6, EOS, EOS, 9, 9): ((1, 1, 1, 2, 3, 3), (EOS,)),  # a document that only ends
        (5, 6, 0, 0, 0, 0): ((1, 1, 0, 0, 0, 0), (5, 6)),
        (0, 0, 0, 0, 0, 0): ((0, 0, 0, 0, 0, 0), None),
    }
    made = [Row(np.array(tokens), np.array(segments)) for tokens, (segments, _) in rows.items()]
    found = beginnings(make_batch(made, 1), 4, EOS)
    assert found == [wanted for _, wanted in rows.values() if wanted]


def test_what_was_written_is_learned_and_nothing_else() -> None:
    row = _row((5, 6, 7), np.array([8, 9, EOS], np.int32), 10)
    np.testing.assert_array_equal(row.tokens, [5, 6, 7, 8, 9, EOS, 0, 0, 0, 0])
    np.testing.assert_array_equal(row.segments, [1] * 6 + [0] * 4)
    batch = make_batch([row], 2)
    # By the place that predicts: 8, 9 and the end, from the places one to three before each.
    np.testing.assert_array_equal(batch.weights[0, :, 0], [0, 0, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(batch.weights[0, :, 2], [1, 1, 1, 0, 0, 0, 0])
    longer = _row((5, 6), np.arange(20, dtype=np.int32), 10)  # cut at the row's end
    assert len(longer.tokens) == 10 and longer.weights.sum() == 8
