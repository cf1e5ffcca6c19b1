"""How much is asked of a server, and how long its troubles are borne."""

from __future__ import annotations

import random
from dataclasses import dataclass

from drama.augment.endpoint import Trouble
from drama.console import console
from drama.errors import UserError

SAY_AFTER_S = 5.0  # shorter troubles are nobody's business


@dataclass(frozen=True)
class Limits:
    """How much at once, how long, how often, how dear.

    timeout_s: of one try; patience_s: how long the server may give no answer to anything before
    the job ends; tries: of a request that fails while the server is well; first_pause_s doubles
    with every failure up to max_pause_s; max_tokens_total: prompt and completion tokens that this
    run may pay for, beside those of requests in flight when they are reached. 0: only the cache.

    Raises:
        UserError: a value out of bounds.
    """

    concurrency: int = 64
    timeout_s: float = 600.0
    patience_s: float = 600.0
    tries: int = 6
    first_pause_s: float = 0.5
    max_pause_s: float = 30.0
    max_tokens_total: int | None = None

    def __post_init__(self) -> None:
        for name in ("concurrency", "timeout_s", "tries"):
            if getattr(self, name) <= 0:
                raise UserError(f"LLM: {name} must be above 0 (got {getattr(self, name)})")
        for name in ("patience_s", "first_pause_s", "max_pause_s", "max_tokens_total"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"LLM: {name} must not be negative (got {getattr(self, name)})")


class Patience:
    """The server's health, as all requests together see it. Times are seconds of one clock."""

    def __init__(self, limits: Limits, server: str, mend: str) -> None:
        self._limits, self._server, self._mend = limits, server, mend
        self._since: float | None = None
        self._said = False
        self.pause_until = 0.0  # nothing is sent before; at the server's own wish

    def is_well(self) -> None:
        """The server has answered something."""
        if self._said:
            console.print(f"{self._server} answers again", markup=False, soft_wrap=True)
        self._since, self._said = None, False

    def pause(self, trouble: Trouble, failures: int, now: float) -> float:
        """Seconds until the next try of a request that failed for the `failures`-th time.

        Raises:
            UserError: the patience is at its end.
        """
        self._since = now if self._since is None else self._since
        left = self._since + self._limits.patience_s - now
        if left <= 0 or trouble.wait_s > left:
            wish = f", and wants {trouble.wait_s:,.0f} s more" if trouble.wait_s > left else ""
            raise UserError(
                f"{self._server} has given no answer for {now - self._since:,.0f} s ({trouble})"
                f"{wish}; {self._mend}"
            )
        if now - self._since > SAY_AFTER_S and not self._said:
            self._said = True
            text = f"waiting for {self._server} ({trouble}), {left:,.0f} s at most"
            console.print(text, markup=False, soft_wrap=True)
        self.pause_until = max(self.pause_until, now + trouble.wait_s)
        doubled = self._limits.first_pause_s * 2.0 ** min(failures - 1, 30)
        # not all at once: what failed together would fail together again
        pause = min(doubled, self._limits.max_pause_s) * random.uniform(0.5, 1.0)
        return trouble.wait_s + min(pause, left - trouble.wait_s)
