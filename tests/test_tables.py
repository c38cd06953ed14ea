"""Tables: every row once an epoch, every token once a table, and no padding, order or layout that changes a target."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jaxalign.data.sources import read
from jaxalign.data.tables import bucket, check, collect, order, pack, pack_rows, pad, pairs, preview
from jaxalign.data.text import Document, chat, fill, plain, prompt_completion
from jaxalign.types import Batch

EOS = 0  # the id of padding, too


def document(*tokens, weights=None):
    weights = np.ones(len(tokens)) if weights is None else weights
    return Document(np.array(tokens, np.int32), np.array(weights, np.float32))


@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 30), batch=st.integers(1, 70), seed=st.integers(0, 2**63))
def test_order_is_a_fresh_permutation_each_epoch(size, batch, seed):
    steps = -(-3 * size // batch)
    rows = np.concatenate([order(size, batch, seed=seed, step=step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(rows[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert rows.dtype == np.int64


def test_order_depends_on_seed_and_epoch_and_on_no_call_before():
    one = order(1000, 1000, seed=1, step=0)
    assert (one != order(1000, 1000, seed=2, step=0)).any() and (one != order(1000, 1000, seed=1, step=1)).any()
    halves = [order(1000, 500, seed=1, step=step) for step in (1, 0)]
    assert np.concatenate(halves[::-1]).tolist() == one.tolist()  # another batch size walks the same sequence
    assert abs(np.corrcoef(one, np.arange(1000))[0, 1]) < 0.1


def test_order_is_the_same_in_every_version():
    assert order(8, 8, seed=3, step=0).tolist() == [6, 1, 5, 2, 7, 4, 3, 0]
    assert order(8, 12, seed=3, step=1).tolist() == [4, 0, 2, 1, 2, 4, 1, 3, 6, 5, 0, 7]  # the end of epoch 1, then epoch 2


@pytest.mark.parametrize("bad", [{"size": 0}, {"batch": 0}, {"seed": -1}, {"step": -1}])
def test_order_refuses_what_has_no_meaning(bad):
    with pytest.raises(ValueError, match="sizes are at least 1"):
        order(**{"size": 4, "batch": 2, "seed": 0, "step": 0} | bad)


documents = st.lists(
    st.lists(st.integers(0, 5), min_size=1, max_size=8).map(lambda tokens: document(*tokens)), min_size=1, max_size=20
)


@settings(deadline=None, max_examples=80)
@given(documents=documents, length=st.integers(8, 20))
def test_pack_keeps_every_document_once_and_every_target(documents, length):
    rows = pack(documents, length)
    assert sorted(id(d) for row in rows for d in row) == sorted(id(d) for d in documents)
    batch = check(pack_rows(rows, length, EOS), 6, targets=False)
    assert (batch.segments > 0).sum() == sum(len(d.tokens) for d in documents)
    for r, row in enumerate(rows):
        for k, d in enumerate(row, 1):
            assert batch.tokens[r, batch.segments[r] == k].tolist() == d.tokens.tolist()
    assert np.asarray(batch.targets).sum() == batch.weights.sum() == sum(len(d.tokens) - 1 for d in documents)
    filled = sorted((batch.segments > 0).sum(axis=1))
    assert len(rows) == 1 or filled[0] + filled[1] > length  # no two rows would fit into one


def test_pack_fills_rows_and_is_deterministic():
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    made = [document(*range(n)) for n in lengths]
    rows = pack(made, 128)
    assert lengths.sum() / (len(rows) * 128) > 0.97
    assert [[len(d.tokens) for d in row] for row in rows] == [[len(d.tokens) for d in row] for row in pack(made, 128)]


@settings(deadline=None, max_examples=40)
@given(documents=documents, length=st.integers(8, 12), pad_id=st.integers(0, 5))
def test_padding_changes_nothing_a_model_sees(documents, length, pad_id):
    for side in ("right", "left"):
        batch = check(pad(documents, length, side=side, pad_id=pad_id), 6, targets=False)
        for row, d in enumerate(documents):
            here = batch.segments[row] > 0
            assert batch.tokens[row, here].tolist() == d.tokens.tolist()  # also where a token has the id of padding
            assert batch.weights[row, here].tolist() == [0, *d.weights[1:]]
            assert (batch.tokens[row, ~here] == pad_id).all() and here[0 if side == "right" else -1]


def test_eos_is_learnt_where_it_is_also_the_padding():
    batch = pad([document(3, 4, EOS)], 6, pad_id=EOS)
    assert np.asarray(batch.targets).tolist() == [[0, 1, 1, 0, 0, 0]]


def test_what_does_not_fit_names_its_row():
    with pytest.raises(ValueError, match="row 1: a document of 4 tokens, where 1 to 3 fit"):
        pad([document(1), document(1, 2, 3, 4)], 3)
    with pytest.raises(ValueError, match="document 1: a document of 0 tokens"):
        pack([document(1), document()], 3)
    with pytest.raises(ValueError, match="row 0: a document of 2 tokens, where 1 to 1 fit"):
        pack_rows([[document(1, 2), document(1, 2)]], 3)
    with pytest.raises(ValueError, match="'right' and 'left'"):
        pad([document(1)], 3, side="both")


def test_pairs_line_up():
    made = pairs([document(1, 2)], [document(1, 3, 4)], [0.5], 4)
    assert made.chosen.tokens.tolist() == [[1, 2, 0, 0]] and made.rejected.tokens.tolist() == [[1, 3, 4, 0]]
    assert made.margin.dtype == np.float32 and made.margin.tolist() == [0.5]
    with pytest.raises(ValueError, match="1 chosen, 2 rejected"):
        pairs([document(1)], [document(1)] * 2, [0.0], 4)
    with pytest.raises(ValueError, match="row 1: the margin is nan"):
        pairs([document(1)] * 2, [document(2)] * 2, [0.0, np.nan], 4)


def test_collect_counts_what_it_drops_and_remembers_where_rows_came_from():
    rows = [3, 9, 12, 4]

    def make(n):
        return document(*range(n), weights=[0] * (n - 2) + [1, 1])

    table = collect(rows, make, length=10, source="x")
    assert table.rows.tolist() == [0, 1, 3] and [len(d.tokens) for d in table.documents] == [3, 9, 4]
    assert table.counts == {"rows": 4, "kept": 3, "cut": 1, "without_target": 1, "equal": 0, "tokens": 16, "targets": 6}
    assert collect(rows, make, length=10, source="x", keep="end").counts["kept"] == 4
    with pytest.raises(ValueError, match="x: nothing to learn from is left of 1 rows: 1 have no target within 10 tokens"):
        collect([12], make, length=10, source="x")
    with pytest.raises(ValueError, match="x, row 1: '{b}' of the template is not a column"):
        collect([{"b": ""}, {"a": ""}], lambda row: [fill("{b}", row), document(1, 2)][1], length=10, source="x")


def test_a_target_that_nothing_predicts_is_none():
    with pytest.raises(ValueError, match="1 have no target"):
        collect([document(5)], lambda made: made, length=10, source="x")
    assert collect([document(5)], lambda made: made, length=10, source="x", targets=False).counts["kept"] == 1
    with pytest.raises(ValueError, match="^x: the prompts of all 2 rows are empty$"):
        collect([document()] * 2, lambda made: made, length=10, source="x", targets=False)


def test_pairs_that_prefer_nothing_are_dropped():
    rows = [(document(1, 2), document(1, 3)), (document(1, 2, 3), document(1, 2, 4)), (document(1, 2), document(1, 2))]
    table = collect(rows, lambda row: row, length=2, source="x")
    assert table.rows.tolist() == [0] and table.counts["equal"] == 2  # the second pair differs only behind the cut


def test_bucket_rounds_up():
    assert [bucket(n, 64) for n in (1, 64, 65, 200)] == [64, 64, 128, 256]


def batch(tokens=((1, 2, 3, 0),), segments=((1, 1, 1, 0),), weights=((0, 1, 1, 0),)):
    return Batch(np.array(tokens, np.int32), np.array(segments, np.int32), np.array(weights, np.float32))


@pytest.mark.parametrize(
    "bad, says",
    [
        (batch(tokens=((1, 2, 4, 0),)), "row 0, column 2: token id 4 is not in a vocabulary of 4: is this"),
        (batch(tokens=((1, 2, 3, -1),)), "row 0, column 3: token id -1"),
        (batch(segments=((1, 0, 1, 0),)), "row 0, column 2: segment 1 does not continue"),
        (batch(segments=((1, 2, 1, 0),)), "row 0, column 2: segment 1 does not continue"),
        (batch(segments=((2, 2, 2, 0),)), "row 0, column 0: segment 2 does not continue"),
        (batch(segments=((1, 3, 3, 0),)), "row 0, column 1: segment 3 does not continue"),
        (batch(segments=((-1, -1, 1, 0),)), "row 0, column 0: segment -1 does not continue"),
        (batch(weights=((0, np.nan, 1, 0),)), "row 0, column 1: weight nan is not a finite number"),
        (batch(weights=((0, -1, 1, 0),)), "row 0, column 1: weight -1.0 is not a finite number >= 0"),
        (batch(weights=((0, 0, 0, 1),)), "row 0, column 3: weight 1.0 on padding"),
        (batch(weights=((1, 0, 0, 0),)), "rows 0 to 0 have no target"),
        (Batch(np.ones((1, 4)), np.ones((1, 4), np.int32), np.ones((1, 4), np.float32)), "i32, i32, f32"),
        (Batch(np.ones((1, 4), np.int32), np.ones((1, 3), np.int32), np.ones((1, 4), np.float32)), "i32, i32, f32"),
    ],
)
def test_check_names_what_is_wrong_and_where(bad, says):
    with pytest.raises(ValueError, match=says):
        check(bad, 4)


def test_check_passes_what_is_sound():
    check(batch(), 4)
    check(batch(segments=((0, 1, 2, 0),), weights=((0, 0, 0, 0),)), 4, targets=False)


@pytest.fixture(scope="module")
def smollm(shared):
    return AutoTokenizer.from_pretrained(shared / "data" / "models" / "smollm2_135m_instruct")


def test_preview_marks_what_is_trained_on(smollm, shared):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "[b]Hé[/b]"}]
    half = plain(smollm, "a b c")
    half.weights[1] = 0.5
    shown = preview(smollm, pack_rows([[chat(smollm, talk), half]], 64))
    assert "<|im_start|>assistant\n⟦[b]Hé[/b]<|im_end|>⟧" in shown
    assert "a⟦ b⟧*0.5⟦ c<|im_end|>⟧" in shown
    assert "row 0, document 2: 4 tokens, 3 of them targets" in shown
    stories = AutoTokenizer.from_pretrained(shared / "data" / "models" / "stories260k")
    shown = preview(stories, pad([prompt_completion(stories, "Once upon", " a time")], 16), rows=5)
    assert "<s> Once upon⟦ a time<s>⟧" in shown and "10 of 16 columns are padding" in shown


def test_real_instructions_pairs_and_sentences_become_batches(smollm, shared):
    data, vocab = shared / "data", len(smollm)

    def rows(name):
        return read(str(data / name))[:60]

    def instruction(row):
        return prompt_completion(smollm, fill("{definition}\n\n{input}\n", row), fill("{targets[0]}", row))

    table = collect(rows("instruction/natural_instructions_train.jsonl.gz"), instruction, length=512, source="instructions")
    assert 30 < table.counts["kept"] < 60  # some are longer than 512
    made = check(pack_rows(pack(table.documents, 512), 512), vocab)
    assert np.asarray(made.targets).sum() == table.counts["targets"]

    def pair(row):
        return tuple(prompt_completion(smollm, row["prompt"], fill(f" {{{side}}}", row)) for side in ("chosen", "rejected"))

    table = collect(rows("preferences/hh_harmless_train.jsonl.gz"), pair, length=512, source="pairs")
    chosen, rejected = zip(*table.documents, strict=True)
    made = pairs(chosen, rejected, np.zeros(len(chosen)), 512)
    check(made.chosen, vocab)
    check(made.rejected, vocab)
    for row in (0, 1):  # both sides answer one prompt
        start = int(np.argmax(made.chosen.weights[row] > 0))
        assert start == np.argmax(made.rejected.weights[row] > 0)
        assert (made.chosen.tokens[row, :start] == made.rejected.tokens[row, :start]).all()

    table = collect(
        rows("sentiment/sentences_train.jsonl.gz"), lambda row: plain(smollm, row["text"]), length=64, source="sentences"
    )
    assert table.counts["kept"] == 60
    check(pad(table.documents, bucket(max(len(d.tokens) for d in table.documents), 16)), vocab)
