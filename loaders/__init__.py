"""The data that training reads, one file per source: glyphs, digits (MNIST and SVHN), cub, spectra,
and arrays, a user's own .npz. Nothing here knows how a model is judged.

To add a data set, write a file with

    load(name, root) -> data.Dataset      # root: the folder of the data sets, a Path

and enter its name in data.DATASETS and its networks in nets.modalities. `spec` of the Dataset are
the arguments of nets.modalities. `views` names the images that oracles judge, and the modalities
that are stacked, from top to bottom, to each: {"image": (0, 1)} where two halves make one digit,
{"mnist": (0,), "svhn": (1,)} where each shows it; {} where there are none.

If files have to be made first, add the file to data.PREPARED: `python data.py NAME` then offers its
flags(flag), where flag is argparse's add_argument, and calls prepare(root, args).
"""
