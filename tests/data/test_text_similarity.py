"""Texts are compared by their words. Run: pytest tests/data/test_text_similarity.py"""

import json
import sys

import numpy as np
import pytest

from peft_blueprint.data.text_similarity import NearDuplicates, _tokens, bm25
from peft_blueprint.errors import BlueprintError, FormatError


QUERIES = ["What is 5 plus 7?", "How many apples has Ann"]
DOCUMENTS = ["Ann has 5 apples and 7 pears, what is the sum", "The capital of France", "", "apples apples apples"]
RNG = np.random.default_rng(0)
LONG = RNG.integers(0, 10_000, 200).tolist()


def changed(tokens, share):
    """Replace the end of a copy so that it has this Jaccard similarity with the original."""
    shingles = len(tokens) - 4
    cut = round(shingles * (1 - share) / (1 + share))
    return tokens[: len(tokens) - cut] + RNG.integers(20_000, 90_000, cut).tolist()


def by_hand(query, documents):
    """BM25 as in Lucene, straight from its formula."""
    lengths = np.array([len(d) for d in documents])
    scores = np.zeros(len(documents))
    for token in query:
        counts = np.array([d.count(token) for d in documents])
        rarity = np.log(1 + (len(documents) - (counts > 0).sum() + 0.5) / ((counts > 0).sum() + 0.5))
        scores += rarity * counts / (counts + 1.5 * (1 - 0.75 + 0.75 * lengths / lengths.mean()))
    return scores


def test_bm25_follows_its_formula():
    """Each query's scores divided by the largest, averaged over queries."""
    documents = [_tokens(document) for document in DOCUMENTS]
    expected = [by_hand(_tokens(query), documents) for query in QUERIES]
    expected = np.mean([scores / scores.max() for scores in expected], axis=0)
    assert np.allclose(bm25(QUERIES, DOCUMENTS), expected, rtol=1e-5)
    assert expected[0] == 1 and expected[1:3].tolist() == [0, 0]


def test_token_ids_work_like_words():
    """Of any values, in lists or arrays, also after an empty document."""
    ids = {word: 10**6 + i for i, word in enumerate(sorted({w for t in (*QUERIES, *DOCUMENTS) for w in _tokens(t)}))}
    queries, documents = ([[ids[w] for w in _tokens(text)] for text in texts] for texts in (QUERIES, DOCUMENTS))
    assert np.allclose(bm25(queries, documents), bm25(QUERIES, DOCUMENTS))
    turned = [np.array(document, dtype=np.int64) for document in reversed(documents)]
    assert np.allclose(bm25(queries, [[], *turned])[1:].argmax(), 3)


def test_a_query_without_a_match_counts_as_nothing():
    """So do documents without words."""
    assert bm25(["zzz", "France"], DOCUMENTS).tolist() == [0, 0.5, 0, 0]
    assert bm25(["zzz", ""], DOCUMENTS).tolist() == [0] * 4
    assert bm25(["zzz"], ["", "!"]).tolist() == [0, 0]


def test_bm25_refuses_empty_and_mixed_input():
    """Texts and token ids do not compare."""
    for queries, documents in (([], ["a"]), (["a"], [])):
        with pytest.raises(BlueprintError, match="at least one query and one document"):
            bm25(queries, documents)
    with pytest.raises(BlueprintError, match="mixed"):
        bm25(["a"], [[1, 2]])
    with pytest.raises(BlueprintError, match="Expected a text or"):
        bm25([None], ["a"])


def test_near_duplicates_are_found():
    """Nearly all at a similarity of 0.9 and hardly any at 0.65, with a threshold of 0.8."""
    found = {0.9: 0, 0.65: 0}
    for share in found:
        for _ in range(20):
            original = RNG.integers(0, 10_000, 200).tolist()
            guard = NearDuplicates()
            assert guard.is_new(original)
            found[share] += not guard.is_new(changed(original, share))
    assert found[0.9] >= 19 and found[0.65] <= 1


def test_copies_are_found_despite_case_and_punctuation():
    """A duplicate is not remembered."""
    guard = NearDuplicates()
    text = "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May."
    assert guard.is_new(text)
    assert not guard.is_new(text.upper().replace(",", ";"))
    assert guard.is_new(text.replace("48", "51").replace("April", "June").replace("half", "twice"))
    assert len(guard) == 2


def test_short_texts_are_compared_exactly():
    """Texts shorter than a shingle are duplicates only if equal, also empty ones."""
    guard = NearDuplicates()
    for text in ("one two three four", "one two three five", "", [1, 2, 3], [1, 2]):
        assert guard.is_new(text)
        assert not guard.is_new(text)
    assert not guard.is_new("One two, three: four!")
    assert guard.is_new("1 2 3"), "words are not ids"
    assert len(guard) == 6


def test_the_threshold_decides():
    """For the same pair."""
    pair = [LONG, changed(LONG, 0.7)]
    assert [count_new(pair, threshold) for threshold in (0.5, 0.95)] == [1, 2]


def count_new(texts, threshold):
    """Count the new texts."""
    guard = NearDuplicates(threshold)
    return sum(guard.is_new(text) for text in texts)


def test_it_continues_from_its_state():
    """Through JSON, with the same answers; the same seed gives the same state."""
    texts = [RNG.integers(0, 50, 8).tolist() for _ in range(30)] + ["a b", "c"]
    guards = [NearDuplicates(0.5, seed=seed) for seed in (1, 1, 2)]
    for guard in guards:
        for text in texts:
            guard.is_new(text)
    first, same, other = (guard.state() for guard in guards)
    assert first == same and first["signatures"] != other["signatures"]
    resumed = NearDuplicates.from_state(json.loads(json.dumps(first)))
    assert len(resumed) == len(guards[0]) and resumed.state() == first
    more = [*texts, *([*text, 3] for text in texts[:30]), [7] * 9]
    assert [resumed.is_new(text) for text in more] == [guards[0].is_new(text) for text in more]


def test_near_duplicates_refuses_bad_options_and_states(monkeypatch):
    """Without the extra the error names it."""
    for wrong in ({"threshold": 0}, {"threshold": 1.1}, {"shingle": 0}, {"permutations": 4}, {"seed": -1}):
        with pytest.raises(BlueprintError, match="threshold must be in"):
            NearDuplicates(**wrong)
    with pytest.raises(BlueprintError, match="Expected a text or"):
        NearDuplicates().is_new([0.5])
    good = NearDuplicates().state()
    for wrong in ({"threshold": 2}, {"signatures": "AAAA"}, {"signatures": "§"}, {"keys": None}, {"keys": [1]}):
        with pytest.raises(FormatError, match="near-duplicates are not valid"):
            NearDuplicates.from_state(good | wrong)
    with pytest.raises(FormatError, match="near-duplicates are not valid"):
        NearDuplicates.from_state({})
    monkeypatch.setitem(sys.modules, "datasketch", None)
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(BlueprintError, match=r"peft-blueprint\[data\]"):
        NearDuplicates()
    with pytest.raises(BlueprintError, match=r"peft-blueprint\[data\]"):
        NearDuplicates.from_state(good)
    with pytest.raises(BlueprintError, match=r"peft-blueprint\[data\]"):
        bm25(["a"], ["a"])
