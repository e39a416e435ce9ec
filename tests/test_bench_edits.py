"""bench.edits: how an edit is made, and both ways of a tree."""

from small import small_model

from bench import edits
from bench.acceptance import Setting


def test_an_edit_is_a_piece_and_its_begin_with_another_name():
    piece = "def area(shape):\n    return shape.width\n\ndef room(shape):\n    if shape:\n        return 1\n"
    made = edits.edit(piece)
    assert made == piece + "\n\n\ndef area(new_shape):\n    return new_shape.width\n\ndef room(new_shape):"
    assert edits.edit("return return return\nshape, shape, shapes, a, a, a") is None, "no name often enough"


def test_sets_are_as_large_as_asked():
    few, others = (edits.prompts_of(name, 5, "dev") for name in edits.SETS)
    assert len(few) == len(others) == 5 and all(text.count("new_") for text in few) and few != others


def test_both_ways_keep_the_same_text_and_lookup_more_of_one_that_repeats():
    """And the model has its operations again."""
    model = small_model(eos_token_ids=())
    whole = model.ops
    found, without = edits.both(model, [[5, 6, 7]], Setting(0.0, 7), 120)
    assert model.ops is whole and found.stats[0].tokens == without.stats[0].tokens == 120
    assert found.per_cycle > 1.3 * without.per_cycle
