"""Pages and tables from plain results: what a verb found, said so that people see it at a glance.

Nothing here trains, measures or computes a statistic; every figure comes from the dict that is passed in.
"""
