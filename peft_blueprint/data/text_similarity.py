"""Texts compared by the words in them: BM25 against queries, and near-duplicates in a stream.

Words or token ids, no model. bm25s and datasketch are an extra: `pip install peft-blueprint[data]`. Knows nothing of
what is chosen in the end.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import BlueprintError, FormatError


Text = str | Sequence[int]

SHINGLE = 5
PERMUTATIONS = 128

_WORD = re.compile(r"\w+")
_MISSING = "Comparing texts needs bm25s and datasketch: pip install 'peft-blueprint[data]'."
_SCHEME = "affine32"  # of datasketch's permutations


def words(text: str) -> list[str]:
    """The words and numbers of a text, in order, without regard to case."""
    return _WORD.findall(text.casefold())


def bm25(queries: Sequence[Text], documents: Sequence[Text]) -> np.ndarray:
    """How well each document matches the queries word by word; a lexical baseline for choosing data.

    BM25 as in Lucene, with k₁ = 1.5 and b = 0.75 (Kamphuis et al. 2020, doi:10.1007/978-3-030-45442-5_4; computed by
    bm25s, Lù 2024, arXiv:2407.03618). Each query's scores are divided by the largest that a document has for it, so
    that long queries and rare words count no more than others, and averaged over queries. How rare a word is follows
    from the documents, which are therefore needed all at once: about 12 bytes for every different word of each.

    Args:
        queries: texts, or their token ids; what is looked for, such as a small target set.
        documents: texts where the queries are texts, else token ids.

    Returns:
        (documents,) in [0, 1]; 0 for a document without a word of a query.

    Raises:
        BlueprintError: without queries or documents, if texts and token ids are mixed, or without bm25s.
    """
    if not len(queries) or not len(documents):
        raise BlueprintError(f"{len(queries)} queries and {len(documents)} documents: give at least one of both.")
    asked, given = [_tokens(text) for text in queries], [_tokens(text) for text in documents]
    kinds = {isinstance(token, str) for tokens in (*asked, *given) for token in tokens[:1]}
    if len(kinds) > 1:
        raise BlueprintError("Texts and token ids are mixed: give queries and documents both as texts or both as ids.")
    vocabulary: dict[str | int, int] = {}
    corpus = [[vocabulary.setdefault(token, len(vocabulary)) for token in tokens] for tokens in given]
    scores = np.zeros(len(documents))
    if not vocabulary:
        return scores
    try:
        from bm25s import BM25
    except ImportError as error:
        raise BlueprintError(_MISSING) from error
    index = BM25(k1=1.5, b=0.75, method="lucene", backend="numpy")
    index.index((corpus, vocabulary), create_empty_token=False, show_progress=False)
    for tokens in asked:
        of_query = index.get_scores_from_ids([vocabulary[token] for token in tokens if token in vocabulary])
        scores += of_query / (of_query.max() or 1.0)
    return scores / len(queries)


class NearDuplicates:
    """Tells of each text in a stream whether one much like it came before.

    Texts are compared as sets of shingles, every five words in a row, by the share that both have of all that either
    has (Broder 1997, doi:10.1109/SEQUEN.1997.666900). The share is estimated from 128 minimal hashes, with a standard
    error of at most 0.045, and 0.035 at a share of 0.8; candidates are found by locality-sensitive hashing (datasketch),
    which is set to overlook few. At a threshold of 0.8, of pairs that share 0.75, 0.8, 0.85 and 0.9 of their shingles
    about 7, 44, 91 and 100 % are found. Texts of fewer words than a shingle are compared as a whole, and exactly.

    The first of several like texts is the new one, so that the order matters; for the same order, threshold and seed the
    answers are the same. Memory grows with the texts that are remembered, by about 5.6 kB each, and a state by 0.7 kB; a text
    shorter than a shingle takes 0.1 kB. A text of 100 words takes 1 to 3 ms.

    Args:
        threshold: the share from which on two texts are near-duplicates, in (0, 1].
        shingle: words, or token ids, in a shingle.
        permutations: minimal hashes, at least 16: the standard error is √(share·(1 − share)/permutations).
        seed: of the hashes.

    Raises:
        BlueprintError: for an option out of range, or without datasketch.
    """

    def __init__(
        self, threshold: float = 0.8, shingle: int = SHINGLE, permutations: int = PERMUTATIONS, seed: int = 0
    ):
        if not 0 < threshold <= 1 or shingle < 1 or permutations < 16 or not 0 <= seed < 2**32:
            raise BlueprintError(
                f"threshold={threshold}, shingle={shingle}, permutations={permutations}, seed={seed}: give a share in "
                "(0, 1], a number from 1, one from 16, and a seed from 0 to 2³² − 1."
            )
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise BlueprintError(_MISSING) from error
        self.threshold, self.shingle = float(threshold), operator.index(shingle)
        self.permutations, self.seed = operator.index(permutations), operator.index(seed)
        self._empty = MinHash(num_perm=permutations, seed=seed, scheme=_SCHEME)
        # candidates are looked at again, so that one too many costs less than one overlooked
        self._index = MinHashLSH(threshold=min(threshold, 0.99), num_perm=permutations, weights=(0.1, 0.9))
        self._signatures: dict[int, np.ndarray] = {}
        self._short: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}  # by key, what `_short` is the other way round
        self._next = 0

    def __len__(self) -> int:
        return len(self._signatures) + len(self._short)

    def is_new(self, text: Text) -> bool:
        """Whether no text like this one came before; it is remembered if so.

        Args:
            text: a text, or its token ids. The two are never alike.

        Raises:
            BlueprintError: if it is neither.
        """
        mark = self.mark(text)
        is_new = not self.like(mark)
        if is_new:
            self.remember(mark, self._next)
        return is_new

    def mark(self, text: Text) -> Any:
        """What a text is compared by: the digest of a short one, else its minimal hashes.

        Raises:
            BlueprintError: if it is neither a text nor a list of token ids.
        """
        tokens = _tokens(text)
        if len(tokens) < self.shingle:
            return hashlib.blake2b(_joined(tokens), digest_size=16).digest()
        rows = range(len(tokens) - self.shingle + 1)
        hashes = self._empty.copy()
        hashes.update_batch({_joined(tokens[i : i + self.shingle]): None for i in rows})
        return hashes

    def like(self, mark: Any) -> list[int]:
        """The keys of all that is remembered and much like the text of this mark."""
        if isinstance(mark, bytes):
            return [self._short[mark]] if mark in self._short else []
        near = self._index.query(mark)
        return sorted(key for key in near if (self._signatures[key] == mark.hashvalues).mean() >= self.threshold)

    def remember(self, mark: Any, key: int) -> None:
        """Remember the text of this mark under a number that none has yet."""
        if isinstance(mark, bytes):
            self._short[mark], self._digests[key] = key, mark
        else:
            self._index.insert(key, mark, check_duplication=False)
            self._signatures[key] = mark.hashvalues
        self._next = max(self._next, key + 1)

    def forget(self, key: int) -> None:
        """Remember the text of this number no longer."""
        if key in self._signatures:
            del self._signatures[key]
            self._index.remove(key)
        else:
            del self._short[self._digests.pop(key)]

    def state(self) -> dict[str, Any]:
        """All that is remembered, as JSON can hold it."""
        return {
            "threshold": self.threshold,
            "shingle": self.shingle,
            "permutations": self.permutations,
            "seed": self.seed,
            "signatures": base64.b64encode(b"".join(self._bytes_of_signatures())).decode(),
            "short": base64.b64encode(b"".join(self._short)).decode(),
            "keys": [*self._signatures, *self._short.values()],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> NearDuplicates:
        """The guard that said `state`, to be continued.

        Raises:
            FormatError: if it is no such state.
            BlueprintError: without datasketch.
        """
        try:
            known = cls(state["threshold"], state["shingle"], state["permutations"], state["seed"])
            signatures = base64.b64decode(state["signatures"], validate=True)
            short = base64.b64decode(state["short"], validate=True)
            rows = np.frombuffer(signatures, dtype="<u4").reshape(-1, known.permutations)
            digests = np.frombuffer(short, dtype="V16").tolist()
            keys = [operator.index(key) for key in state["keys"]]
            if len(set(keys)) != len(rows) + len(digests):
                raise ValueError(f"{len(set(keys))} keys of {len(rows) + len(digests)} texts")
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            if isinstance(error, BlueprintError) and error.__cause__ is not None:
                raise
            raise FormatError(f"This is no state of a search for near-duplicates: {error}. Start it anew.") from error
        for key, row in zip(keys, rows, strict=False):
            hashes = known._empty.copy()
            hashes.hashvalues = row.astype(np.uint32)
            known.remember(hashes, key)
        for key, digest in zip(keys[len(rows) :], digests, strict=True):
            known.remember(digest, key)
        return known

    def _bytes_of_signatures(self) -> list[bytes]:
        return [row.astype("<u4").tobytes() for row in self._signatures.values()]


def _tokens(text: Text) -> list[str] | list[int]:
    """A text's words, or token ids as they are."""
    if isinstance(text, str):
        return words(text)
    try:
        return [operator.index(token) for token in text]
    except TypeError as error:
        raise BlueprintError(
            f"{text!r:.80} is neither a text nor a list of token ids. Give either, one for every example."
        ) from error


def _joined(tokens: list[str] | list[int]) -> bytes:
    """One text for some tokens; that of words differs from that of ids."""
    is_words = bool(tokens) and isinstance(tokens[0], str)
    return ("w" + "\n".join(map(str, tokens)) if is_words else f"i{tokens}").encode("utf-8", "surrogatepass")
