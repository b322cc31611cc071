"""Ledgers beside one another: bundles, merging and comparing."""
