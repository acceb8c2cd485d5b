"""Evaluation: all that judging needs. Training imports nothing of it.

command.py    python eval.py: runs in, tables and figures out; EXTRAS: the metrics of single data sets
oracles.py    classifiers of digits, which judge generated images
own.py        a user's own arrays: how well every modality is predicted from the others
fill.py       --fill
cub.py, spectra.py    metrics and figures of these data sets
tables.py, papers.py, figures.py    results as text, the papers' numbers, results as pictures
"""
