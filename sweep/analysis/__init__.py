"""From rows to answers: tables, claims, statistics, figures, queries and the report.

Reads the ledger alone; writes nothing into it.
"""
