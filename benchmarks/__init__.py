"""One file per data set: how it is read and evaluated, and what the papers report for it.

To add a data set, write benchmarks/FILE.py and add "NAME": "FILE" to data.DATASETS. The file must
define

    load(name, root) -> data.Dataset
        The training and the test split, from files below the folder `root`. ValueError, with one
        sentence, for files that cannot be read. Dataset.spec holds the arguments of
        nets.modalities, which chooses the networks; Dataset.note is printed beside results.

With that alone, eval.py evaluates it as it evaluates a user's own arrays (npz.py): how well each
modality is regenerated from the others. The file may define more, which eval.py then uses:

    flags(flag)                     adds flags to `python data.py NAME`: flag("--weights", ...)
    prepare(root, args)             what that command does before load, such as extracting features
    views(dataset)                  images of digits (labels 0 to 9) that oracles judge:
                                    {view: function of the list of M modalities -> (B, C, H, W)}, a
                                    view per modality, or a single one that puts parts together
    ORACLE_STEPS                    {view: training steps of its oracle}, needed beside `views`
    correlated(model, dataset, root) -> fit, pairs
                                    arrays for a CCA in place of oracles: fit = (x, y), training
                                    pairs; pairs = {name: (x, y)}, whose correlation is measured
    evaluate(model, dataset, root, seed) -> dict
                                    metrics that replace all others in metrics.json; the model is in
                                    eval mode
    notes(results) -> list          lines below the table; results: the contents of metrics.json of
                                    several runs
    draw(run, dataset, root, path)  a figure of a run (an eval.Run), saved to `path`
    compare(results, folder)        a figure of several runs, saved into `folder`
    PAPER                           the papers' numbers: rows (name, model, --unpaired, column of
                                    the table, values at f = 1, 1/2, 1/4, 1/8, 1/16, one string)

Files here import data, nets and each other, never eval or a model. Shared by all: oracles.py
(classifiers that judge images), npz.py (a user's own arrays), tables.py (results as Markdown),
figures.py (what a figure shows), drawing.py (arrays in, image files out).
"""
