"""One file per data set: how it is read, what judges it, what the papers report for it.

To add one, write a file here and its line in data.DATASETS. The file has to have

    load(name, root)     -> data.Dataset: two splits; ValueError, in a sentence, for bad files

and may have, each used where it is found,

    flags(flag)          flags of `python data.py NAME`
    prepare(root, args)  what that command does before it loads: makes files from downloads
    views(dataset)       oracles of digits judge it, each one of these: {name: function of the M
                         modalities -> images, H, W >= 24}, labels being 0 to 9; a single one puts
                         together what are parts of it; with ORACLE_STEPS, {name: steps of training}
    evaluate(model, dataset, root, seed)
                         metrics of its own in place of all others, as they stand in metrics.json;
                         the model is in eval mode, the generator seeded
    correlated(model, dataset, root)
                         or arrays between which eval.py measures correlations instead: training
                         pairs (x, y), to fit a CCA to, and {name: (x, y)}
    notes(results)       lines below its table; results: what metrics.json holds, of several runs
    draw(run, dataset, root, path)
                         its own figure of an eval.Run, beside those that fit any data; with
                         `evaluate` instead of them
    compare(results, folder)
                         its own figure of several runs, if there is one
    PAPER                what the papers report: rows (name, model, unpaired, column of the table,
                         numbers at f = 1, 1/2, 1/4, 1/8, 1/16 in one string)

Data with neither views nor evaluate nor correlated, and a user's own arrays, are judged and drawn as
npz.py has it; what fills in new examples for any run stands there too.

A file here imports data.py and nets.py, never eval.py or a model. oracles.py (classifiers of
digits), drawing.py (all of matplotlib) and tables.py (metrics as text) serve all of them.
"""
