"""Leaf code that several rooms share: ids, errors, page hashes, settings, logging, clock."""
