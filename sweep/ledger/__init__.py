"""The ledger: the Parquet under `results/`, its storage, leases and provenance.

The one source of truth for what was trained. What rows mean for a sweep is for `planning` and
`analysis`.
"""
