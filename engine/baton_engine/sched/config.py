"""Numbers that the scheduler plans with. Resolved by the engine; nothing here is a user-facing setting by itself."""

from __future__ import annotations

from dataclasses import dataclass

from baton_common.errors import ConfigError
from baton_common.ids import PageHash


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Frozen after start; raises ConfigError naming the field when two numbers cannot work together."""

    total_pages: int  # of the KV pool, without its dummy page
    page_tokens: int
    rows: int  # requests that may be in one step
    step_tokens: int  # query tokens per step; at least `rows`, so that every decode always fits
    context_tokens: int  # longest prompt + output of the model
    hash_root: PageHash  # start of the page-hash chain for the empty cache salt
    eos_token_ids: frozenset[int] = frozenset()
    max_queued: int = 1024  # more waiting requests are refused with Overloaded
    max_reserved: int = 64  # RESERVE requests that hold pages but no row yet
    max_filling: int = 16  # requests that hold pages while KV comes from elsewhere; more compute it all
    unsent_steps: int = 4  # steps of KV announced and not sent, beyond which no PREFILL request is admitted
    partial_prefills: int = 4  # long prompts in progress at the same time; short ones do not count
    scan_limit: int = 128  # waiting requests that one plan looks at
    preemption_limit: int = 2  # per request; after that it gets all pages to its end at once
    patience_s: float = 2.0  # a request that waited this long and does not fit is no longer overtaken

    def __post_init__(self) -> None:
        for name in ("total_pages", "page_tokens", "rows", "context_tokens", "scan_limit", "partial_prefills"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}", param=name)
        for name in ("max_queued", "max_reserved", "max_filling", "unsent_steps", "preemption_limit", "patience_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}", param=name)
        if self.step_tokens < self.rows:
            raise ConfigError(
                f"step_tokens ({self.step_tokens}) is below rows ({self.rows}); a step must hold one token of each row",
                param="step_tokens",
            )
