"""Evaluation: all that judging needs. Training imports nothing of it.

command.py               python eval.py: runs in, tables and figures out; EXTRAS: what single data
                         sets have in place of the metrics of all others
oracles.py               classifiers of digits, which judge generated images
own.py                   a user's own arrays: how well each modality is predicted from the others
fill.py                  --fill
latent.py                distances of posteriors, samples in the plane, the gradient
cub.py, spectra.py       metrics and figures of these data sets
tables.py, papers.py     results as text, and the numbers of the papers
figures.py, curves.py    results as pictures
"""
