"""Samples that cannot be used, by shard and reason -> what is said of them, and the end of a run that has too many."""

import logging
from collections import Counter

MAX_BAD_IN_A_ROW = 100
MIN_READ_TO_JUDGE = 1_000  # samples, before the share of bad ones counts
MIN_BAD_TO_JUDGE = 10  # samples of a shard, before their share of it counts
TOLD_EVERY = 1_000  # replaced samples of a kind
REMEDY = "repair or remove that source, or raise data.max_bad_share"

log = logging.getLogger(__name__)


class Quality:
    """Counts on one rank; `rejects` is (shard, reason) -> samples that were replaced."""

    def __init__(self, max_bad_share: float):
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"data.max_bad_share is {max_bad_share}; give a share from 0 to 1, such as 0.01")
        self.rejects: Counter[tuple[str, str]] = Counter()
        self._reasons: Counter[str] = Counter()
        self._bad: Counter[str] = Counter()  # by shard
        self._looked_at: Counter[str] = Counter()  # by shard, bad ones included
        self._max_bad_share = max_bad_share

    def judge(self, looked_at: Counter[str], rejects: Counter[tuple[str, str]], whole: bool) -> None:
        """Count a batch, not `whole` where too many bad samples follow one another. ValueError then, and where more than its
        share is bad, of all samples or of those of a shard."""
        self._looked_at.update(looked_at)
        for (shard, reason), count in rejects.items():
            self._tell(shard, reason, count)
            self.rejects[shard, reason] += count
            self._reasons[reason] += count
            self._bad[shard] += count
        if not whole:
            raise ValueError(
                f"{MAX_BAD_IN_A_ROW} samples in a row cannot be used: {self._most()}; check data.sources, data.task"
            )
        bad, seen = self._bad.total(), self._looked_at.total()
        if seen >= MIN_READ_TO_JUDGE and bad > self._max_bad_share * seen:
            raise ValueError(f"{bad} of {seen} samples cannot be used: {self._most()}; {REMEDY}")
        for shard in {shard for shard, _ in rejects}:
            bad, seen = self._bad[shard], self._looked_at[shard]
            if bad > MIN_BAD_TO_JUDGE and bad > self._max_bad_share * seen:
                raise ValueError(f"{bad} of {seen} samples of {shard} cannot be used: {self._most()}; {REMEDY}")

    def _tell(self, shard: str, reason: str, count: int) -> None:
        """The first sample of a reason, and each thousandth."""
        before = self._reasons[reason]
        if before == 0 or before // TOLD_EVERY < (before + count) // TOLD_EVERY:
            log.warning("%d sample(s) replaced so far: %s, at last in %s", before + count, reason, shard)

    def _most(self) -> str:
        return "; ".join(f"{count} x {reason} ({shard})" for (shard, reason), count in self.rejects.most_common(5))
