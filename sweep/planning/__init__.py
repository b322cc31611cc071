"""What is left to do: the plan, packs, tuning choices and cost estimates.

Reads sweep files and the ledger; starts nothing.
"""
