"""From a pool of examples to the chosen few: everything is scored once, in order, and can be resumed.

Knows nothing of how a score is made, nor of what a selection is called.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch.distributed as dist
from tqdm.auto import tqdm

from .._processes import process_count
from ..errors import BlueprintError, MismatchError
from .best import Best
from .coresets import facility_location, k_centre
from .pool import Candidate, Example, Pool
from .predictor import Predictor, fit_predictor
from .resume import Progress, Seen, next_digest
from .scoring import Method, Scorer, Work
from .text_similarity import NearDuplicates


BUFFER = 1000  # examples of a stream of which the measured ones are drawn, at least
_BATCHES = 8  # in a chunk

Featurize = Callable[[Sequence[Candidate]], np.ndarray]


@dataclass(frozen=True, eq=False)
class Scored:
    """What is known of the examples of a pool.

    Args:
        indices: (n,) positions of those with a target.
        values: (n,) scores, or (n, m) points.
    """

    indices: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Picked:
    """What was chosen.

    Args:
        indices: positions, the best first.
        scores: of these.
        duplicates: how many were passed over for being much like a chosen one.
    """

    indices: list[int]
    scores: list[float]
    duplicates: int = 0


@dataclass
class Scan:
    """Scoring all examples of a pool, with what must be known for that and what was learnt on the way.

    Args:
        pool: the examples.
        work: the model at work.
        progress: what is known so far.
        every: examples after which progress is saved.
        shows_bar: whether to show a progress bar.
        started: when this run began, by `time.perf_counter`.
    """

    pool: Pool
    work: Work
    progress: Progress
    every: int = 1024
    shows_bar: bool = True
    started: float = field(default_factory=time.perf_counter)
    fallbacks: list[str] = field(default_factory=list)
    predictor: Predictor | None = None
    known: dict[int, float] = field(default_factory=dict)
    _ahead: Iterator[tuple[int, Example]] | None = None  # a stream of which the first examples were read before
    _skipped: dict[int, str] = field(default_factory=dict)  # digests before examples that follow some left out of it
    _measured: Seen | None = None  # those that were measured by another run, of a stream

    def note(self, said: str) -> None:
        """Something is done otherwise than asked; said once."""
        if said not in self.fallbacks:
            self.fallbacks.append(said)

    def predicting(
        self, score: Scorer, featurize: Featurize, scalars: int, small: int, logarithmic: bool, seed: int
    ) -> Scorer:
        """A scorer that learns from a small random subset what `score` would say (Algorithm 2, lines 1 to 3).

        Of a stream, the subset is drawn from its first 1000 examples, or ten times as many as are measured, or so many
        that there are more with a target than are measured. Where there are no more examples than are to be measured,
        all are measured and nothing is predicted.

        Args:
            score: the dear one.
            featurize: candidates → features (n, f).
            scalars: how many of the first features stand for something by themselves.
            small: how many to measure.
            logarithmic: whether to fit the logarithm.
            seed: of the subset and the predictor.

        Raises:
            MismatchError: if another run measured other examples.
        """
        arrays, notes = self.progress.arrays, self.progress.notes
        if "small" not in arrays and self.progress.position:  # another run found too few, and measured all so far
            return score
        if "small" in arrays:
            self._expect(arrays["small"].tolist())
        else:
            found = self._subset(small, seed)
            if len(found) <= small:
                self.note(
                    f"there are only {len(found)} examples to learn from, no more than were to be measured: all were "
                    "measured and nothing was predicted"
                )
                return score
            chosen = sorted(found[:small], key=lambda one: one.index)
            if self.progress.is_kept:
                seen = Seen([one.index for one in chosen])
                for one in chosen:
                    seen.see(one.index, one.example)
                notes["measured"] = seen.digest
            arrays["small"] = np.array([one.index for one in chosen])
            arrays["small_values"] = self._chunked(score, chosen)
            arrays["small_features"] = self._chunked(featurize, chosen)
            self._save(lambda: None)
        values = arrays["small_values"]
        if logarithmic:
            values = values.clip(min=1e-6 * (float(np.median(values)) or 1.0))
        predictor = fit_predictor(
            arrays["small_features"], values, scalars=range(scalars), logarithmic=logarithmic, seed=seed
        )
        self.predictor = predictor
        if predictor.interval[0] <= 0:
            low, high = predictor.interval
            self.note(
                f"what was predicted may be no better than chance: on examples held out the rank correlation is "
                f"{predictor.rank_correlation:.2f} [{low:.2f}, {high:.2f}]"
            )
        predicted = predictor.predict(arrays["small_features"])
        self.known = dict(zip(arrays["small"].tolist(), predicted.tolist(), strict=True))
        return lambda candidates: predictor.predict(featurize(candidates))

    def every_score(self, score: Scorer) -> Scored:
        """Scores of all examples of what is no stream.

        Raises:
            BlueprintError: if none has a target.
        """
        arrays = self.progress.arrays
        indices = [arrays["indices"]] if "indices" in arrays else []
        values = [arrays["values"]] if "values" in arrays else []

        def take(candidates: Sequence[Candidate], found: np.ndarray) -> None:
            indices.append(np.array([one.index for one in candidates]))
            values.append(found)

        def keep() -> None:
            if indices:
                indices[:], values[:] = [np.concatenate(indices)], [np.concatenate(values)]
                arrays["indices"], arrays["values"] = indices[0], values[0]

        self._scan(score, take, keep)
        self.require(bool(indices))
        return Scored(np.concatenate(indices), np.concatenate(values))

    def best_of_stream(self, score: Scorer, sign: int, count: int, deduplicate: bool) -> tuple[Picked, Best]:
        """The best of a stream, in memory that grows with how many are wanted alone.

        Of near-duplicates the one with the highest score is kept, of equal ones the first. They are told from what is
        kept at the time: an example that gave way to a better one is forgotten. So a list and a stream differ only where
        one example is much like two that are not like each other.

        Raises:
            BlueprintError: if none has a target.
        """
        notes = self.progress.notes
        best = Best.from_state(notes["best"]) if "best" in notes else Best(count)
        guard = NearDuplicates.from_state(notes["guard"]) if "guard" in notes else None
        guard = NearDuplicates() if guard is None and deduplicate else guard
        notes.setdefault("duplicates", 0)

        def take(candidates: Sequence[Candidate], found: np.ndarray) -> None:
            for one, value in zip(candidates, found.tolist(), strict=True):
                if not best.takes(sign * value, one.index):
                    continue
                if guard is not None:
                    mark = guard.mark(one.text)
                    like = guard.like(mark)
                    notes["duplicates"] += len(like)
                    if any(best.score_of(other) >= sign * value for other in like):
                        continue
                    for other in like:
                        best.remove(other)
                        guard.forget(other)
                    if best.last is not None:
                        guard.forget(best.last)
                    guard.remember(mark, one.index)
                best.offer(sign * value, one.index, dict(one.example))

        def keep() -> None:
            notes["best"] = best.state()
            if guard is not None:
                notes["guard"] = guard.state()

        self._scan(score, take, keep)
        self.require(len(best) > 0)
        ranked = best.ranked()
        picked = Picked([index for index, _, _ in ranked], [sign * s for _, s, _ in ranked], notes["duplicates"])
        return picked, best

    def pick(self, scored: Scored, method: Method, count: int, deduplicate: bool, seed: int) -> Picked:
        """The best of all that were scored; ties go to the earlier. Near-duplicates of what is taken are passed over."""
        guard = NearDuplicates() if deduplicate else None
        if method.coreset is not None:
            return self._coreset(scored, method.coreset, count, guard, seed)
        indices: list[int] = []
        scores: list[float] = []
        duplicates = 0
        for i in np.lexsort((scored.indices, -method.sign * scored.values)).tolist():
            if len(indices) == count:
                break
            index = int(scored.indices[i])
            if guard is not None and not guard.is_new(self.candidate(index).text):
                duplicates += 1
                continue
            indices.append(index)
            scores.append(float(scored.values[i]))
        return Picked(indices, scores, duplicates)

    def require(self, any_found: bool) -> None:
        """Raise BlueprintError if no example has a target."""
        if not any_found:
            notes = self.progress.notes
            raise BlueprintError(
                f"None of {self.progress.position} examples has a target within the maximum length "
                f"({notes.get('without_targets', 0)} have none): there is nothing to choose from. Raise max_length, or "
                "look at the columns."
            )

    def _coreset(self, scored: Scored, kind: str, count: int, guard: NearDuplicates | None, seed: int) -> Picked:
        """A coreset of those that are not near-duplicates of an earlier one; scores are minus the order of choice."""
        is_kept = [guard is None or guard.is_new(self.candidate(index).text) for index in scored.indices.tolist()]
        kept = np.flatnonzero(is_kept)
        points, most = scored.values[kept], min(count, len(kept))
        order = (
            k_centre(points, most, seed) if kind == "k_centre" else facility_location(points, most, metric="cosine")
        )
        return Picked(scored.indices[kept[order]].tolist(), [-float(i) for i in range(most)], len(is_kept) - len(kept))

    def candidate(self, index: int) -> Candidate:
        """One of those that were scored."""
        found = self.pool.candidate(index, self.pool.at(index))
        assert found is not None
        return found

    def _subset(self, small: int, seed: int) -> list[Candidate]:
        """Random examples with targets: more than `small`, or all that there are."""
        generator = np.random.default_rng([seed, 1])
        if self.pool.length is not None:
            order = generator.permutation(self.pool.length).tolist()
            found: list[Candidate] = []
            for index in order:
                one = self.pool.candidate(index, self.pool.at(index))
                if one is not None:
                    found.append(one)
                if len(found) > small:
                    break
            return found
        usable, read = self._read_ahead(small)
        if len(usable) > small:
            self.note(f"the measured examples were drawn from the stream's first {read}")
        return [usable[i] for i in generator.permutation(len(usable)).tolist()]

    def _read_ahead(self, small: int) -> tuple[list[Candidate], int]:
        """A stream's first examples that have a target, more than `small` if there are, and how many were read.

        What was read stays in the stream, but for examples without a target: only the digest of these is kept.
        """
        stream = iter(self.pool)
        kept: list[tuple[int, Example]] = []
        usable: list[Candidate] = []
        one, digest, read = None, "", 0
        for index, example in stream:
            if kept and one is None:
                self._skipped.pop(kept.pop()[0], None)
                self._skipped[index] = digest
            one, read = self.pool.candidate(index, example), index + 1
            kept.append((index, example))
            if one is not None:
                usable.append(one)
            if self.progress.is_kept:
                digest = next_digest(digest, example)
            if len(usable) > small and read >= max(BUFFER, 10 * small):
                break
        self._ahead = chain(kept, stream)
        return usable, read

    def _expect(self, measured: Sequence[int]) -> None:
        """These were measured by another run: raise MismatchError if the data have others in their places."""
        seen = Seen(measured, self.progress.notes.get("measured"))
        if self.pool.is_stream:
            self._measured = seen
            return
        for index in measured:
            seen.see(index, self.pool.at(index))

    def _chunked(self, score: Scorer, candidates: Sequence[Candidate]) -> np.ndarray:
        size = self._chunk
        parts = [candidates[i : i + size] for i in range(0, len(candidates), size)]
        return np.concatenate([self.work.together(score, part) for part in parts])

    @property
    def _chunk(self) -> int:
        return _BATCHES * self.work.batch_size * process_count()

    def _scan(
        self, score: Scorer, take: Callable[[Sequence[Candidate], np.ndarray], None], keep: Callable[[], None]
    ) -> None:
        """Hand all examples from where the progress stands to `take`, a chunk at a time, with their scores."""
        progress, notes = self.progress, self.progress.notes
        notes.setdefault("without_targets", 0)
        notes.setdefault("tokens", 0)
        start, before, digest, saved = progress.position, progress.digest, "", progress.position
        is_quiet = not self.shows_bar or (process_count() > 1 and dist.get_rank() > 0)
        chunk: list[Candidate] = []
        seen = 0
        with tqdm(total=self.pool.length, initial=start, unit="example", desc="Scoring", disable=is_quiet) as bar:

            def flush() -> None:
                unknown = [one for one in chunk if one.index not in self.known]
                found = iter(self.work.together(score, unknown)) if unknown else iter(())
                if chunk:
                    values = [self.known[one.index] if one.index in self.known else next(found) for one in chunk]
                    take(chunk, np.array(values))
                chunk.clear()

            for index, example in self.pool if self._ahead is None else self._ahead:
                seen = index + 1
                if self._measured is not None:
                    self._measured.see(index, example)
                if index in self._skipped:
                    notes["without_targets"] += index - progress.position
                    bar.update(index - progress.position)
                    progress.position, progress.digest = index, self._skipped[index]
                if index < start:
                    digest = next_digest(digest, example)
                    if seen == start and digest != before:
                        raise MismatchError(
                            f"The first {start} examples are not those of the kept state: the data have changed. Give "
                            "the same data in the same order, or start anew with another keep_state."
                        )
                    continue
                one = self.pool.candidate(index, example)
                progress.add(example)
                if one is None:
                    notes["without_targets"] += 1
                else:
                    chunk.append(one)
                    notes["tokens"] += len(one.row["input_ids"])
                bar.update()
                if len(chunk) >= self._chunk:
                    flush()
                    is_sure = self._measured is None or not self._measured.is_waiting
                    if is_sure and progress.position - saved >= self.every:
                        saved = self._save(keep)
            flush()
        if seen < start:
            raise MismatchError(
                f"The kept state is of {start} examples and more, and there are {seen}: the data have changed. Give the "
                "same data in the same order, or start anew with another keep_state."
            )
        if self._measured is not None:
            self._measured.check()
        self._save(keep)

    def _save(self, keep: Callable[[], None]) -> int:
        if self.progress.is_kept:
            keep()
            self.progress.notes["fallbacks"] = self.fallbacks
            cost = self.work.total_cost()
            seconds = cost.seconds + time.perf_counter() - self.started
            self.progress.notes["cost"] = [cost.forward_tokens, cost.measured_tokens, seconds]
            self.progress.save()
        return self.progress.position
