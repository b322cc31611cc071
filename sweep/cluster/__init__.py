"""Ray clusters: connecting, the check of nodes before a run, submitted jobs.

What runs on the nodes is in `execution`.
"""
