"""Running a plan on Ray Tune: the driver, the scheduler of packs, and the workers.

What to run is decided in `planning`; results go into the `ledger`.
"""
