"""Solvers side by side on one model, in virtual time: which one, on which cluster?

question.py      what is asked: a base configuration, solvers, clusters, and how much is spent
reading.py       reads it from TOML
grid.py          the trials of a solver, and what extends them
outcomes.py      what a run gave: its evaluations, its staleness, its bytes
statistics.py    the target, ratios in pairs, and their intervals
kept_runs.py     makes each run once, and keeps it
course.py        tunes, sets the target, makes the runs that are reported
report.py        the table, the CSV and the sentences
plots.py         the plots
"""
