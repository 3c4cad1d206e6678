"""Every name in the folder of a run and in that of a sweep, once; whoever writes or reads one of them asks here."""

# a run
CONFIG = "config.yaml"  # the whole resolved configuration; the first thing that is written
RESULTS, TABLE = "results.json", "results.md"  # rows; the last thing that is written, and what a person looks at
CHECKPOINTS, LAST = "checkpoints", "last.ckpt"
ADAPTERS, FINETUNED = "adapters", "finetuned"  # by task, what was trained: adapters, or weights in the base's layout
FUSED = "fused"  # by rule
HEADS = "heads"  # by task, of ViTs
BASE = "base"  # of language models that lie on disk in another form only
PLOTS, SCORES = "plots", "scores.png"
LEASES = "leases"  # by task
LOGGED = "metrics.csv"  # by Lightning's CSV logger, where its flag puts it below the run
SCORED = {"validate": "validate.json", "test": "test.json"}  # by command, beside a finished run's results

# tasks that were trained by other jobs: parts/<tasks>/ with config.yaml, checkpoints and, once done, trained.json
PARTS = "parts"
TRAINED = "trained.json"
TAKEN = f"{PARTS}/taken.json"  # the tasks that the run took over from parts

OVERWRITTEN = ".overwritten"  # the run that one given --overwrite takes the place of, until that has a checkpoint

# diagnostics
DIAGNOSTICS = "diagnostics"
COSINES, NORMS, NORM_SHARES = "cosines", "norms", "norm_shares"  # .csv, the first and the last as plots, too
PLANE, PLANE_TASKS = "plane", "plane_tasks"

OF_A_RUN = (
    CONFIG, RESULTS, TABLE, TRAINED, CHECKPOINTS, ADAPTERS, FINETUNED, HEADS, BASE, PARTS, FUSED, PLOTS, DIAGNOSTICS,
)  # fmt: skip
"""What a run writes into its folder, but for leases."""

# a folder of weights
FUSION = "fusion.json"  # of fused ones: rule, coefficients, norms, inputs
OWN = "fusionlab.json"  # of all: base, linearization point, fields of a row
STATS = "fusion_stats.json"  # squared norms of the task vector
UNIFIED, MASKS = "unified.safetensors", "masks.safetensors"  # instead of weights, where the task must be known
ROUTED, ROUTED_OWN = "wemoe.safetensors", "wemoe.json"  # instead of weights, where each sample has its own
CARD = "README.md"
ADAPTER_CONFIG, ADAPTER_MODEL, ADAPTER_PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LINEARIZED_WEIGHTS = "linearized_adapter_model.safetensors"  # as arXiv 2310.04742 published them

# a sweep
SWEEP = "sweep.json"
RUNS, FITS = "runs", "fit"  # <method>-seed<n>/, and the configuration that each was given, as .yaml
LEDGER, SINGLE_TASK, MODELS = "ledger", "single_task", "sums"  # with points, inputs and leases, each
POINTS, INPUTS = "points", "inputs"

# a report
REPORT, PAGE = "report.md", "report.html"
