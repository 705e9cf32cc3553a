"""Rotary rules out of a config: the flat old form (rope_theta, rope_scaling) and the newer rope_parameters."""

from __future__ import annotations

import math

from baton_engine.models.fields import Fields
from baton_kernels.rope import RopeSpec

THETA = 10_000.0
GEMMA3_GLOBAL_THETA = 1_000_000.0
GEMMA3_LOCAL_THETA = 10_000.0


def one_rope(config: Fields, windows: tuple[int | None, ...]) -> tuple[RopeSpec, ...]:
    """The same rule in every layer."""
    theta = config.number("rope_theta", THETA)
    rule = config.section("rope_parameters") or config.section("rope_scaling")
    return (_rope(config, rule, theta),) * len(windows)


def gemma3_ropes(config: Fields, windows: tuple[int | None, ...]) -> tuple[RopeSpec, ...]:
    """Layers with a window turn fast and are never stretched, the others follow the long-context rule."""
    rules = config.section("rope_parameters")
    local_rule = rules.section("sliding_attention") if rules else None
    global_rule = rules.section("full_attention") if rules else config.section("rope_scaling")
    local = _rope(config, local_rule, config.number("rope_local_base_freq", GEMMA3_LOCAL_THETA))
    far = _rope(config, global_rule, config.number("rope_theta", GEMMA3_GLOBAL_THETA))
    return tuple(far if window is None else local for window in windows)


def _rope(config: Fields, rule: Fields | None, theta: float) -> RopeSpec:
    if rule is None:
        return RopeSpec(theta=theta)
    theta = rule.number("rope_theta", theta)
    if rule.number("partial_rotary_factor", 1.0) != 1.0:
        raise rule.wrong("partial_rotary_factor", "1")
    kind = rule.text("rope_type", rule.text("type", "default"))
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(kind=kind, theta=theta, factor=rule.number("factor"))
    context = config.integer("max_position_embeddings")
    original = rule.integer("original_max_position_embeddings", context)
    if kind == "llama3":
        return RopeSpec(
            kind=kind,
            theta=theta,
            factor=rule.number("factor"),
            original_tokens=original,
            low_frequency_factor=rule.number("low_freq_factor"),
            high_frequency_factor=rule.number("high_freq_factor"),
        )
    if kind == "yarn":
        factor = rule.number("factor", context / original)
        return RopeSpec(
            kind=kind,
            theta=theta,
            factor=factor,
            original_tokens=original,
            beta_fast=rule.number("beta_fast", 32.0),
            beta_slow=rule.number("beta_slow", 1.0),
            amplitude=_yarn_amplitude(rule, factor),
            truncate=rule.flag("truncate", default=True),
        )
    raise rule.wrong("rope_type", "one of default, linear, llama3, yarn")


def _yarn_amplitude(rule: Fields, factor: float) -> float:
    given = rule.optional_number("attention_factor")
    if given is not None:
        return given

    def growth(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    if rule.has("mscale") and rule.has("mscale_all_dim"):
        return growth(rule.number("mscale")) / growth(rule.number("mscale_all_dim"))
    return growth(1.0)
