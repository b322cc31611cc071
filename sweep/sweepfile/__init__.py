"""The sweep file: from YAML to validated trials with their ids.

Reads, checks and expands files, and locks and fetches what they name. Knows nothing of results.
"""
