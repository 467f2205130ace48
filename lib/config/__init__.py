"""Frozen, validated configuration: reading, overriding, digests. Knows no experiment."""
