"""From a declared service to the objects that it needs. Pure: no I/O, no clock, equal input gives equal output."""
