"""Score a pool of examples in order, resumable, and choose the best."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np

from .._processes import process_count, process_rank
from .._progress import progress_bar
from ..errors import BlueprintError, MismatchError
from .coresets import facility_location, k_centre
from .examples import Candidate, Example, Pool
from .options import Method, SelectionOptions
from .predictor import Predictor, fit_predictor
from .resume import Progress, TopK, extend_digest
from .scoring import ExampleScorer, ScoreFunction
from .text_similarity import NearDuplicates


READ_AHEAD = 1000  # examples of a stream, at least, that the measured ones are drawn from
_BATCHES = 8  # in a chunk


class Scores(NamedTuple):
    """Positions (n,) of the examples with a target, and their scores (n,) or points (n, m)."""

    indices: np.ndarray
    values: np.ndarray


class Choice(NamedTuple):
    """Positions of the chosen examples, best first, their scores, and the number of near-duplicates skipped."""

    indices: list[int]
    scores: list[float]
    duplicates: int


@dataclass
class Scan:
    """A pass over a pool that scores its examples, continued from `progress`."""

    pool: Pool
    scorer: ExampleScorer
    progress: Progress
    options: SelectionOptions
    shows_bar: bool = True
    started: float = field(default_factory=time.perf_counter)
    fallbacks: list[str] = field(default_factory=list)  # deviations from the request, in words
    predictor: Predictor | None = None  # fitted by `learn`
    known: dict[int, float] = field(default_factory=dict)  # by position, scores that need not be computed again
    _ahead: Iterator[tuple[int, Example]] | None = None  # a stream whose first examples were read ahead
    _skipped: dict[int, str] = field(default_factory=dict)  # digest before each example that follows dropped ones
    _expected: dict[int, str] = field(default_factory=dict)  # digests of examples measured by an earlier run

    def note(self, text: str) -> None:
        """Record a deviation from the request, once."""
        if text not in self.fallbacks:
            self.fallbacks.append(text)

    def learn(self, score: ScoreFunction, featurize: ScoreFunction, scalars: int, logarithmic: bool) -> ScoreFunction:
        """Score a small random subset and learn to predict the others (Algorithm 2, lines 1 to 3).

        The subset of a stream is drawn from its first 1000 examples, or ten times the number to measure, or until more
        have a target than are to be measured. If there are no more examples than that, all are scored.

        Args:
            score: the expensive score.
            featurize: candidates → features (n, f).
            scalars: number of leading features with a meaning of their own.
            logarithmic: fit the logarithm of the score.

        Returns:
            A function that predicts scores; `score` itself if there are too few examples.
        """
        arrays, notes, small = self.progress.arrays, self.progress.notes, self.options.small
        if "small" in arrays:
            self._expected = dict(zip(arrays["small"].tolist(), notes["measured"], strict=True))
        elif self.progress.position:  # an earlier run found too few examples
            return score
        else:
            found = self._draw_subset()
            if len(found) <= small:
                self.note(
                    f"only {len(found)} examples have a target, of small={small}: all were measured, none predicted"
                )
                return score
            chosen = sorted(found[:small], key=lambda one: one.index)
            if self.progress.is_kept:
                notes["measured"] = [extend_digest("", one.example) for one in chosen]
            arrays["small"] = np.array([one.index for one in chosen])
            arrays["small_values"] = self._score_chunks(score, chosen)
            arrays["small_features"] = self._score_chunks(featurize, chosen)
            self._save()
        values, features = arrays["small_values"], arrays["small_features"]
        if logarithmic:
            values = values.clip(min=1e-6 * (float(np.median(values)) or 1.0))
        predictor = fit_predictor(
            features, values, scalars=range(scalars), logarithmic=logarithmic, seed=self.options.seed
        )
        self.predictor = predictor
        low, high = predictor.interval
        if low <= 0:
            self.note(
                f"predictions may be no better than chance: the rank correlation on held-out examples is "
                f"{predictor.rank_correlation:.2f} [{low:.2f}, {high:.2f}]"
            )
        self.known = dict(zip(arrays["small"].tolist(), predictor.predict(features).tolist(), strict=True))
        return lambda candidates: predictor.predict(featurize(candidates))

    def score_all(self, score: ScoreFunction) -> Scores:
        """Score all examples of a pool that is not a stream.

        Raises:
            BlueprintError: if none has a target.
        """
        arrays = self.progress.arrays
        parts = [(arrays["indices"], arrays["values"])] if "indices" in arrays else []

        def keep() -> None:
            if parts:
                arrays["indices"], arrays["values"] = map(np.concatenate, zip(*parts, strict=True))
                parts[:] = [(arrays["indices"], arrays["values"])]

        for candidates, found in self.run(score, keep):
            parts.append((np.array([one.index for one in candidates]), found))
        keep()
        return Scores(arrays["indices"], arrays["values"])

    def choose_from_stream(self, score: ScoreFunction, sign: int, count: int) -> tuple[Choice, list[Example]]:
        """Choose the best of a stream, in memory that grows with `count` alone; return their examples too.

        Of near-duplicates the one with the highest score is kept, of equal ones the first. They are compared with what is
        kept at the time: an example replaced by a better one is forgotten. So a list and a stream differ only if one
        example is similar to two that are not similar to each other.

        Raises:
            BlueprintError: if none has a target.
        """
        notes = self.progress.notes
        best = TopK.from_state(notes["best"]) if "best" in notes else TopK(count)
        guard = NearDuplicates.from_state(notes["guard"]) if "guard" in notes else None
        guard = NearDuplicates() if guard is None and self.options.deduplicate else guard
        notes.setdefault("duplicates", 0)

        def keep() -> None:
            notes["best"] = best.state()
            if guard is not None:
                notes["guard"] = guard.state()

        def offer(value: float, one: Candidate) -> None:
            if not best.would_keep(value, one.index):
                return
            if guard is not None:
                fingerprint = guard.fingerprint(one.text)
                similar = guard.find_similar(fingerprint)
                notes["duplicates"] += len(similar)
                if any(best.score_of(other) >= value for other in similar):
                    return
                for other in similar:
                    best.remove(other)
                    guard.remove(other)
                if best.next_out is not None:
                    guard.remove(best.next_out)
                guard.add(fingerprint, one.index)
            best.offer(value, one.index, dict(one.example))

        for candidates, found in self.run(score, keep):
            for one, value in zip(candidates, (sign * found).tolist(), strict=True):
                offer(value, one)
        ranked = best.ranked()
        choice = Choice([index for index, _, _ in ranked], [sign * s for _, s, _ in ranked], notes["duplicates"])
        return choice, [example for _, _, example in sorted(ranked, key=lambda one: one[0])]

    def choose(self, scores: Scores, method: Method, count: int) -> Choice:
        """Choose the best of all that were scored, without near-duplicates of better ones; ties go to the earlier."""
        guard = NearDuplicates() if self.options.deduplicate else None
        if method.coreset is not None:
            return self._choose_coreset(scores, method.coreset, count, guard)
        chosen: list[int] = []
        duplicates = 0
        for i in np.lexsort((scores.indices, -method.sign * scores.values)).tolist():
            if len(chosen) == count:
                break
            if guard is None or guard.is_new(self.candidate(int(scores.indices[i])).text):
                chosen.append(i)
            else:
                duplicates += 1
        return Choice(scores.indices[chosen].tolist(), scores.values[chosen].tolist(), duplicates)

    def candidate(self, index: int) -> Candidate:
        """Return one of the examples that were scored."""
        found = self.pool.encode(index, self.pool[index])
        assert found is not None
        return found

    def run(
        self, score: ScoreFunction, keep: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Sequence[Candidate], np.ndarray]]:
        """Iterate over chunks of candidates and their scores, from where the progress stands.

        Args:
            score: see `ExampleScorer.distribute`.
            keep: called before the progress is saved, to put the results so far into it.

        Raises:
            BlueprintError: if no example has a target.
            MismatchError: if examples of an earlier run have changed or are missing.
        """
        progress, notes = self.progress, self.progress.notes
        notes.setdefault("without_targets", 0)
        notes.setdefault("tokens", 0)
        start, before, digest, saved = progress.position, progress.digest, "", progress.position
        is_quiet = not self.shows_bar or process_rank() > 0
        chunk: list[Candidate] = []
        seen = 0
        with progress_bar(
            show=not is_quiet, total=self.pool.length, initial=start, unit="example", desc="Scoring"
        ) as bar:
            for index, example in self.pool if self._ahead is None else self._ahead:
                seen = index + 1
                if index in self._expected and self._expected.pop(index) != extend_digest("", example):
                    raise self._other_measured(f"example {index} has changed")
                if index in self._skipped:
                    notes["without_targets"] += index - progress.position
                    bar.update(index - progress.position)
                    progress.position, progress.digest = index, self._skipped[index]
                if index < start:
                    digest = extend_digest(digest, example)
                    if seen == start and digest != before:
                        raise MismatchError(
                            f"The first {start} examples differ from those of the kept state. Give the same data in the "
                            "same order, or start anew with another keep_state."
                        )
                    continue
                one = self.pool.encode(index, example)
                progress.add(example)
                if one is None:
                    notes["without_targets"] += 1
                else:
                    chunk.append(one)
                    notes["tokens"] += len(one.row["input_ids"])
                bar.update()
                if len(chunk) >= self._chunk_size:
                    yield chunk, self._score_unknown(score, chunk)
                    chunk = []
                    if not self._expected and progress.position - saved >= self.options.state_every:
                        self._save(keep)
                        saved = progress.position
            if chunk:
                yield chunk, self._score_unknown(score, chunk)
        if seen < start:
            raise MismatchError(
                f"The kept state covers {start} examples, and the data has only {seen}. Give the same data in the same "
                "order, or start anew with another keep_state."
            )
        if self._expected:
            raise self._other_measured(f"{len(self._expected)} of them are missing")
        self._save(keep)
        if progress.position == notes["without_targets"]:
            raise BlueprintError(
                f"None of {progress.position} examples has a target within the maximum length. Increase max_length, or "
                "check the columns."
            )

    def _choose_coreset(self, scores: Scores, kind: str, count: int, guard: NearDuplicates | None) -> Choice:
        """Choose a coreset of the examples without near-duplicates; a score is minus the place in the order of choice."""
        is_kept = [guard is None or guard.is_new(self.candidate(index).text) for index in scores.indices.tolist()]
        kept = np.flatnonzero(is_kept)
        points, most = scores.values[kept], min(count, len(kept))
        order = k_centre(points, most, self.options.seed) if kind == "k_centre" else facility_location(points, most)
        return Choice(scores.indices[kept[order]].tolist(), [-float(i) for i in range(most)], len(is_kept) - len(kept))

    def _draw_subset(self) -> list[Candidate]:
        """Draw random examples with targets: more than `small`, or all there are."""
        generator, small = np.random.default_rng([self.options.seed, 1]), self.options.small
        if self.pool.length is not None:
            found: list[Candidate] = []
            for index in generator.permutation(self.pool.length).tolist():
                one = self.pool.encode(index, self.pool[index])
                if one is not None:
                    found.append(one)
                if len(found) > small:
                    break
            return found
        usable, read = self._read_ahead()
        if len(usable) > small:
            self.note(f"the measured examples were drawn from the stream's first {read}")
        return [usable[i] for i in generator.permutation(len(usable)).tolist()]

    def _read_ahead(self) -> tuple[list[Candidate], int]:
        """Return a stream's first examples with a target, more than `small` if there are, and how many were read.

        The examples stay in the stream, except that of those without a target only the digest is kept.
        """
        stream, small = iter(self.pool), self.options.small
        kept: list[tuple[int, Example]] = []
        usable: list[Candidate] = []
        one, digest, read = None, "", 0
        for index, example in stream:
            if kept and one is None:
                self._skipped.pop(kept.pop()[0], None)
                self._skipped[index] = digest
            one, read = self.pool.encode(index, example), index + 1
            kept.append((index, example))
            if one is not None:
                usable.append(one)
            if self.progress.is_kept:
                digest = extend_digest(digest, example)
            if len(usable) > small and read >= max(READ_AHEAD, 10 * small):
                break
        self._ahead = chain(kept, stream)
        return usable, read

    def _other_measured(self, reason: str) -> MismatchError:
        return MismatchError(
            f"The {len(self.progress.arrays['small'])} examples that were measured are not those of the kept state: "
            f"{reason}. Give the same data in the same order, or start anew with another keep_state."
        )

    @property
    def _chunk_size(self) -> int:
        return _BATCHES * self.scorer.batch_size * process_count()

    def _score_chunks(self, score: ScoreFunction, candidates: Sequence[Candidate]) -> np.ndarray:
        size = self._chunk_size
        parts = [candidates[i : i + size] for i in range(0, len(candidates), size)]
        return np.concatenate([self.scorer.distribute(score, part) for part in parts])

    def _score_unknown(self, score: ScoreFunction, chunk: Sequence[Candidate]) -> np.ndarray:
        unknown = [one for one in chunk if one.index not in self.known]
        found = iter(self.scorer.distribute(score, unknown)) if unknown else iter(())
        return np.array([self.known[one.index] if one.index in self.known else next(found) for one in chunk])

    def _save(self, keep: Callable[[], None] = lambda: None) -> None:
        if self.progress.is_kept:
            keep()
            self.progress.notes["fallbacks"] = self.fallbacks
            cost = self.scorer.total_cost()
            seconds = cost.seconds + time.perf_counter() - self.started
            self.progress.notes["cost"] = [cost.forward_tokens, cost.measured_tokens, seconds]
            self.progress.save()
