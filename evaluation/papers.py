"""The numbers that the two papers print, to stand below ours (eval.py --paper).

[poe] is "In Defense of Product-of-Experts", [meme] is Joy et al., ICLR 2022.
"""

FRACTIONS = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # the paired fractions f of a row's values

# data set, model, --unpaired ("": the paper has f = 1 alone), column of our table, values
PAPER = [
    # [poe] Table 1
    ("mnist-split", "MMVAE", "", "both", ".539"),
    ("mnist-split", "MMVAE", "", "top", ".221"),
    ("mnist-split", "MMVAE", "", "bottom", ".283"),
    ("mnist-split", "SVAE", "", "both", ".948"),
    ("mnist-split", "SVAE", "", "top", ".872"),
    ("mnist-split", "SVAE", "", "bottom", ".816"),
    ("mnist-split", "VAEVAE", "", "both", ".956"),
    ("mnist-split", "VAEVAE", "", "top", ".887"),
    ("mnist-split", "VAEVAE", "", "bottom", ".830"),
    ("mnist-split", "VAEVAE*", "", "both", ".958"),
    ("mnist-split", "VAEVAE*", "", "top", ".863"),
    ("mnist-split", "VAEVAE*", "", "bottom", ".778"),
    # [meme] Tables 3 and 7, whose modality is read as the generated one
    ("mnist-svhn", "MEME", "svhn", "mnist→svhn", ".625 .551 .323 .172 .143"),
    ("mnist-svhn", "MEME", "mnist", "mnist→svhn", ".625 .572 .485 .470 .451"),
    ("mnist-svhn", "MEME", "split", "mnist→svhn", ".625 .625 .503 .467 .387"),
    ("mnist-svhn", "MEME", "svhn", "svhn→mnist", ".752 .726 .652 .557 .477"),
    ("mnist-svhn", "MEME", "mnist", "svhn→mnist", ".752 .715 .603 .546 .446"),
    ("mnist-svhn", "MEME", "split", "svhn→mnist", ".752 .718 .621 .568 .503"),
    ("mnist-svhn", "MMVAE", "", "mnist→svhn", ".581"),
    ("mnist-svhn", "MMVAE", "", "svhn→mnist", ".735"),
    ("mnist-svhn", "MMVAE, Laplace", "", "mnist→svhn", ".652"),
    ("mnist-svhn", "MMVAE, Laplace", "", "svhn→mnist", ".918"),
    ("mnist-svhn", "MVAE", "svhn", "mnist→svhn", ".123 .110 .112 .105 .105"),
    ("mnist-svhn", "MVAE", "mnist", "mnist→svhn", ".123 .111 .112 .116 .116"),
    ("mnist-svhn", "MVAE", "split", "mnist→svhn", ".123 .108 .101 .101 .101"),
    ("mnist-svhn", "MVAE", "svhn", "svhn→mnist", ".498 .305 .268 .220 .188"),
    ("mnist-svhn", "MVAE", "mnist", "svhn→mnist", ".498 .365 .350 .302 .249"),
    ("mnist-svhn", "MVAE", "split", "svhn→mnist", ".498 .338 .273 .249 .169"),
    # [meme] Table 4
    ("mnist-svhn", "MEME", "svhn", "latent mnist", ".908 .881 .870 .815 .795"),
    ("mnist-svhn", "MEME", "mnist", "latent mnist", ".908 .882 .844 .824 .807"),
    ("mnist-svhn", "MEME", "split", "latent mnist", ".908 .914 .893 .883 .856"),
    ("mnist-svhn", "MEME", "svhn", "latent svhn", ".648 .549 .295 .149 .113"),
    ("mnist-svhn", "MEME", "mnist", "latent svhn", ".648 .581 .398 .384 .362"),
    ("mnist-svhn", "MEME", "split", "latent svhn", ".648 .675 .507 .432 .316"),
    ("mnist-svhn", "MMVAE", "", "latent mnist", ".886"),
    ("mnist-svhn", "MMVAE", "", "latent svhn", ".499"),
    ("mnist-svhn", "MVAE", "svhn", "latent mnist", ".892 .895 .890 .887 .880"),
    ("mnist-svhn", "MVAE", "mnist", "latent mnist", ".892 .895 .898 .896 .895"),
    ("mnist-svhn", "MVAE", "split", "latent mnist", ".892 .898 .895 .894 .898"),
    ("mnist-svhn", "MVAE", "svhn", "latent svhn", ".131 .106 .107 .105 .102"),
    ("mnist-svhn", "MVAE", "mnist", "latent svhn", ".131 .106 .106 .107 .101"),
    ("mnist-svhn", "MVAE", "split", "latent svhn", ".131 .107 .109 .104 .100"),
    # [meme] Table 6, without its MEME_SPLIT rows, which repeat Table 4
    ("mnist-svhn", "MEME", "svhn", "MI mnist", ".075 .086 .101 .102 .103"),
    ("mnist-svhn", "MEME", "mnist", "MI mnist", ".073 .087 .101 .099 .104"),
    ("mnist-svhn", "MEME", "svhn", "MI svhn", ".036 .047 .071 – .134"),
    ("mnist-svhn", "MEME", "mnist", "MI svhn", ".036 .048 .085 .111 .142"),
    ("mnist-svhn", "MMVAE", "", "MI mnist", ".105"),
    ("mnist-svhn", "MMVAE", "", "MI svhn", ".042"),
    ("mnist-svhn", "MVAE", "svhn", "MI mnist", ".110 .107 .106 .106 .142"),
    ("mnist-svhn", "MVAE", "mnist", "MI mnist", ".102 .093 .110 .100 .100"),
    ("mnist-svhn", "MVAE", "split", "MI mnist", ".110 .104 .099 .100 .098"),
    ("mnist-svhn", "MVAE", "svhn", "MI svhn", ".163 .166 .165 .164 .176"),
    ("mnist-svhn", "MVAE", "mnist", "MI svhn", ".163 .175 .170 .174 .182"),
    ("mnist-svhn", "MVAE", "split", "MI svhn", ".163 .165 .172 .173 .179"),
    # [meme] Table 5
    ("cub", "MEME", "image", "corr. image→caption", ".064 .042 .026 .029"),
    ("cub", "MEME", "caption", "corr. image→caption", ".064 .062 .048 .052"),
    ("cub", "MEME", "split", "corr. image→caption", ".064 .046 .031 .027"),
    ("cub", "MEME", "image", "corr. caption→image", ".074 .058 .051 .046"),
    ("cub", "MEME", "caption", "corr. caption→image", ".074 .059 .050 .053"),
    ("cub", "MEME", "split", "corr. caption→image", ".074 .061 .047 .049"),
    ("cub", "MMVAE", "", "corr. image→caption", ".060"),
    ("cub", "MMVAE", "", "corr. caption→image", ".058"),
    ("cub", "MVAE", "image", "corr. image→caption", "-.002 -.000 .001 -.001"),
    ("cub", "MVAE", "caption", "corr. image→caption", "-.002 -.000 .000 .001"),
    ("cub", "MVAE", "split", "corr. image→caption", "-.002 .000 .000 -.001"),
    ("cub", "MVAE", "image", "corr. caption→image", "-.002 -.002 -.002 -.001"),
    ("cub", "MVAE", "caption", "corr. caption→image", "-.002 -.001 -.003 -.002"),
    ("cub", "MVAE", "split", "corr. caption→image", "-.002 -.002 -.002 -.002"),
    *(("cub", m, "", "corr. truth", ".106") for m in ("MEME", "MMVAE", "MVAE")),
]


def starred(run):
    """The model of a run (its args.json), with [poe]'s star where its objective is the other
    model's: VAEVAE*."""
    objective = run["options"].get("objective")
    other = (run["model"], objective) in (("SVAE", "vaevae"), ("VAEVAE", "svae"))
    return run["model"] + "*" * other


def model_name(run):
    """The papers' name for the model of a run; None with an option for which they have no row."""
    options = run["options"]
    if options.get("direction") or options.get("prior_expert") or options.get("variant") == "a":
        return None
    if options.get("kl") == "sample" or options.get("objective") == "elbo":
        return None
    if options.get("family") == "laplace":
        return f"{run['model']}, Laplace"
    return starred(run)


def paper_numbers(run):
    """The papers' numbers for the setting of a run. At f = 1 --unpaired does not matter, and the
    first of their numbers is taken. -> {column: text}"""
    name, printed = model_name(run), {}
    for dataset, model, unpaired, column, values in PAPER:
        series = dict(zip(FRACTIONS, values.split()))
        fits = run["paired"] == 1 or unpaired == run["unpaired"]
        if (dataset, model) == (run["dataset"], name) and fits and run["paired"] in series:
            printed.setdefault(column, series[run["paired"]].replace(".", "0.", 1))
    return printed
