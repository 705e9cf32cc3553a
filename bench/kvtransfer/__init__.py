"""KV handoff under measurement: every figure as value, ceiling of the same minute, fraction, goal; peers beside it."""
