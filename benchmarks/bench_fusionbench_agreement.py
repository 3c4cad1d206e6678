"""Do fused weights agree with FusionBench's? The same fine-tuned weights given to both, method by method.

pip install --no-deps --target FOLDER fusion-bench==0.2.33 hydra-core omegaconf antlr4-python3-runtime==4.9.3 \\
    bidict joblib h5py
PYTHONPATH=.:FOLDER python benchmarks/bench_fusionbench_agreement.py RUN [--output FILE.md]

RUN is a folder of ``fit --model.method full`` on the embedded CLIP; it is made if it is missing. FusionBench's own
classes run, imported; what they are handed is told in ``fusionbench_side.py``. The tensors of the image tower are
compared; the projection, which FusionBench leaves as it is, is the base's on both sides. DARE's draws are ours on both.

Entries a and b agree where |a − b| <= 1 ulp + 4·ε·(|θ₀| + Σ|τ_t|), ε = 2^-24 (2^-53 in float64). The relative
difference of a tensor is ‖a − b‖ / ‖b − θ₀‖. A difference is explained where ours with the option that is named, or
``fusionbench_formulas.py``, which is written from the formula that FusionBench computes, gives theirs; that is seen in
float64, the models of both sides widened. What a page says below its notes was written by hand.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from fusionbench_cases import BATCH, NUM_SAMPLES, Case, by_search, cases_of_data, cases_of_weights
from fusionbench_side import Fuser, Inputs, State, Tower

import fusionlab
from fusionlab.__main__ import main as command
from fusionlab.search import Fisher, Regmean
from fusionlab.search.workbench import workbench

TASKS = ["digits", "signs", "textures", "colours"]
HEADING = """# Agreement with FusionBench, method by method, November 2026

Command: `python benchmarks/bench_fusionbench_agreement.py RUN --output FILE` (two CPU cores, one thread;
{versions}). tiny-clip fine-tuned by `fit --model.method full` on
{tasks}, 60 steps. The {count} tensors of the image tower are compared, for masks
those of every task; RegMean, RegMean++ and Fisher saw the same {samples} training images of each task on both sides.
FusionBench's own code with its defaults, but for those images (its batches: {batch}) and where the first column says
otherwise.

Columns two to five are in float32, as both are used: tensors with an entry beyond 1 ulp + 4·2^-24·(|θ₀| + Σ|τ_t|), the
largest |a − b| of an entry, and the largest ‖a − b‖ / ‖b − θ₀‖ of a tensor, b theirs. The last column is the latter in
float64 once what differs is done as FusionBench does it, by an option of ours or from its formula
(`fusionbench_formulas.py`); where nothing differs, it is ours as it is.

| method | differ | largest | relative | same? | what differs | explained |
|---|---|---|---|---|---|---|"""
NOTES = """
What of FusionBench does not run as released, and how it was run. `TallMaskTaskArithmeticAlgorithm` subtracts tensors
from parameters, which its own check refuses with a `TypeError`; its mask function was called as it calls it, on a state
of tensors. `RegMeanAlgorithmForCLIPPlusPlus` cannot be constructed, since its `_config_mapping` is a dict where its
base has a bidict; a subclass of one line mends it. It also reads `model.vision_model` and `layer(...)[0]`, as
transformers 4 had them: with transformers 5 the latter is the first image of a batch. The models were handed over under
the old names, with layers that return a tuple. Its CLIP classes were given our zero-shot heads and preprocessed images
instead of their lists of classes and a processor. EMR was applied to an unmodulated model for each task, since to
change tasks adds and subtracts, which rounds.

Relative differences of what agrees are those of rounding where a tensor hardly moved (biases of keys, whose gradient is
zero but for it). Not compared: Consensus, of which there is only a function that reads mask files; KnOTS, of which
there is only the alignment; AdaMerging and WEMoE, which are trained. DARE's draws were ours in both."""


def differences(ours: State, theirs: State, inputs: Inputs) -> tuple[int, float, float]:
    """How many tensors have entries beyond rounding, the largest |a − b|, and the largest relative difference."""
    vectors, beyond, largest, relative = inputs.vectors.values(), 0, 0.0, 0.0
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    for key, b in theirs.items():
        name, a = key.rpartition(": ")[2], ours[key]
        base, spread = inputs.base[name], sum(vector[name].abs() for vector in vectors)
        larger, error = torch.maximum(a.abs(), b.abs()), (a - b).abs()
        ulp = torch.nextafter(larger, torch.full_like(larger, torch.inf)) - larger
        beyond += bool((error > ulp + 2 * torch.finfo(base.dtype).eps * (base.abs() + spread)).any())
        largest = max(largest, float(error.max()))
        size = max(float((b - base).norm()), float((a - base).norm()))
        relative = max(relative, float((a - b).norm()) / size if size else 0.0)
    return beyond, largest, relative


def make_inputs(folder: Path) -> Inputs:
    """From a run, which is made if it is missing."""
    if not folder.exists():
        arguments = {"--model.method": "full", "--data.tasks": f"[{', '.join(TASKS)}]", "--trainer.max_steps": "60"}
        arguments["--trainer.default_root_dir"] = str(folder)
        assert command(["fit", "--train_only", *(word for pair in arguments.items() for word in pair)]) == 0
    bench = workbench(
        {
            "model": {"class_path": "ClipModule", "init_args": {"backbone": "tiny-clip", "method": "full"}},
            "data": {"class_path": "ImageTasks", "init_args": {"tasks": TASKS}},
        }
    )

    def of_tower(state: State) -> State:
        return {name: value for name, value in state.items() if name.startswith("vision_model.")}

    model = bench.module.base_model
    base = {name: value.clone() for name, value in of_tower(model.state_dict()).items()}
    states = {task: of_tower(fusionlab.load(folder / "finetuned" / task).weights) for task in TASKS}
    tower, projection = Tower(deepcopy(model.vision_model)), deepcopy(model.visual_projection)
    heads = {task: bench.module.heads[task] for task in TASKS}
    inputs = Inputs(bench, base, states, tower, projection, bench.module.backbone.logit_scale, heads, {})
    return replace(inputs, images=images_seen(inputs))


def images_seen(inputs: Inputs) -> dict[str, torch.Tensor]:
    """The images that our searches read of each task, a fixed choice, as they go into the network."""
    seen: list[torch.Tensor] = []
    patches = inputs.bench.module.base_model.vision_model.embeddings.patch_embedding
    hook = patches.register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach().clone()))
    for search in (Regmean(NUM_SAMPLES), Fisher(NUM_SAMPLES)):
        by_search(search)(inputs)
    hook.remove()
    regmean, fisher = torch.cat(seen).chunk(2)
    assert torch.equal(regmean, fisher)
    return dict(zip(inputs.states, regmean.split(NUM_SAMPLES), strict=True))


def row(case: Case, inputs: Inputs, widened: Inputs, known: dict[tuple[int, int], State]) -> str:
    """A line of the table; what several methods share is in ``known`` once."""

    def of(fuser: Fuser, given: Inputs) -> State:
        key = id(fuser), id(given)
        if key not in known:
            known[key] = given.fused(fuser)
        return known[key]

    theirs = of(case.theirs, inputs)
    beyond, largest, relative = differences(of(case.ours, inputs), theirs, inputs)
    after = differences(of(case.explained or case.ours, widened), of(case.theirs, widened), widened)[2]
    same = "yes" if not beyond else "to float32" if case.explained is None else "no"
    numbers = f"{beyond} of {len(theirs)} | {largest:.1e} | {relative:.1e} | {same}"
    return f"| {case.name} | {numbers} | {case.words} | {after:.1e} |"


def main() -> None:
    """Compare every method and write the page, line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of the fine-tuned models; made if it is missing")
    parser.add_argument("--output", type=Path, help="page to write; printed by default")
    parser.add_argument("--only", nargs="*", default=[""], help="of the methods those with one of these in their names")
    options = parser.parse_args()
    inputs = make_inputs(options.run)
    widened, known = inputs.double(), {}
    cases = [
        case for case in (*cases_of_weights(), *cases_of_data()) if any(word in case.name for word in options.only)
    ]
    with options.output.open("w") if options.output else nullcontext(sys.stdout) as page:
        versions = ", ".join(f"{name} {version(name)}" for name in ("fusion-bench", "torch", "transformers"))
        told = {
            "versions": versions,
            "tasks": ", ".join(TASKS),
            "count": len(inputs.base),
            "samples": NUM_SAMPLES,
            "batch": BATCH,
        }
        print(HEADING.format(**told), file=page)
        for case in cases:
            print(row(case, inputs, widened, known), file=page, flush=True)
        print(NOTES, file=page)


if __name__ == "__main__":
    main()
