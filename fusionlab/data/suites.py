"""Suites of tasks that papers on fusing compare on, as FusionBench has them: hub ids, splits, prompts and class names.

Facts of FusionBench's public configurations (github.com/tanganke/fusion_bench, MIT licence). ``ta8`` are the eight of
task arithmetic, ``tall14`` and ``tall20`` those of TALL masks (arXiv 2405.07813). Class names that are not here are the
data's own, with underscores read as spaces. ``glue8`` is for Flan-T5: the answer is generated and compared letter by
letter, of STS-B read as a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fusionlab.data.known_tasks import IMAGE_TASKS, TEXT_TASKS
from fusionlab.data.tasks import Task
from fusionlab.errors import InputError, did_you_mean, name_list

_TA8 = ("sun397", "stanford_cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
_PETS = (
    *("abyssinian", "american_bulldog", "american_pit_bull_terrier", "basset_hound", "beagle", "bengal", "birman"),
    *("bombay", "boxer", "british_shorthair", "chihuahua", "egyptian_mau", "english_cocker_spaniel", "english_setter"),
    *("german_shorthaired", "great_pyrenees", "havanese", "japanese_chin", "keeshond", "leonberger", "maine_coon"),
    *("miniature_pinscher", "newfoundland", "persian", "pomeranian", "pug", "ragdoll", "russian_blue"),
    *("saint_bernard", "samoyed", "scottish_terrier", "shiba_inu", "siamese", "sphynx", "staffordshire_bull_terrier"),
    *("wheaten_terrier", "yorkshire_terrier"),
)
_FLOWERS = (
    *("pink primrose", "hard-leaved pocket orchid", "canterbury bells", "sweet pea", "english marigold", "tiger lily"),
    *("moon orchid", "bird of paradise", "monkshood", "globe thistle", "snapdragon", "colt's foot", "king protea"),
    *("spear thistle", "yellow iris", "globe-flower", "purple coneflower", "peruvian lily", "balloon flower"),
    *("giant white arum lily", "fire lily", "pincushion flower", "fritillary", "red ginger", "grape hyacinth"),
    *("corn poppy", "prince of wales feathers", "stemless gentian", "artichoke", "sweet william", "carnation"),
    *("garden phlox", "love in the mist", "mexican aster", "alpine sea holly", "ruby-lipped cattleya", "cape flower"),
    *("great masterwort", "siam tulip", "lenten rose", "barbeton daisy", "daffodil", "sword lily", "poinsettia"),
    *("bolero deep blue", "wallflower", "marigold", "buttercup", "oxeye daisy", "common dandelion", "petunia"),
    *("wild pansy", "primula", "sunflower", "pelargonium", "bishop of llandaff", "gaura", "geranium"),
    *("orange dahlia", "pink-yellow dahlia?", "cautleya spicata", "japanese anemone", "black-eyed susan"),
    *("silverbush", "californian poppy", "osteospermum", "spring crocus", "bearded iris", "windflower"),
    *("tree poppy", "gazania", "azalea", "water lily", "rose", "thorn apple", "morning glory", "passion flower"),
    *("lotus", "toad lily", "anthurium", "frangipani", "clematis", "hibiscus", "columbine", "desert-rose"),
    *("tree mallow", "magnolia", "cyclamen", "watercress", "canna lily", "hippeastrum", "bee balm", "ball moss"),
    *("foxglove", "bougainvillea", "camellia", "mallow", "mexican petunia", "bromelia", "blanket flower"),
    *("trumpet creeper", "blackberry lily"),
)
_FACES = ("angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised")
_STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_TISSUE = ("lymph node", "lymph node containing metastatic tumor tissue")
_KANA = ("お", "き", "す", "つ", "な", "は", "ま", "や", "れ", "を")


def _numbered(task: Task) -> Task:
    """The task, whose classes are called so too where the data call them by their numbers."""
    numbers = {str(number): name for number, name in enumerate(task.class_names or ())}
    return replace(task, class_aliases=numbers | dict(task.class_aliases or {})) if numbers else task


_MORE: tuple[Task, ...] = (
    Task(
        "oxford_flowers102",
        path="dpdl-benchmark/oxford_flowers102",
        test="test",
        class_names=_FLOWERS,
        templates=("a photo of a {}, a type of flower.",),
    ),
    Task(
        "pcam",
        path="1aurent/PatchCamelyon",
        validation="valid",
        test="test",
        class_names=_TISSUE,
        templates=("this is a photo of {}",),
    ),
    Task(
        "fer2013",
        path="clip-benchmark/wds_fer2013",
        test="test",
        image_column="jpg",
        label_column="cls",
        class_names=_FACES,
        templates=(
            *("a photo of a {} looking face.", "a photo of a face showing the emotion: {}."),
            *("a photo of a face looking {}.", "a face that looks {}.", "they look {}.", "look at how {} they are."),
        ),
    ),
    Task(
        "oxford_iiit_pet",
        path="timm/oxford-iiit-pet",
        test="test",
        label_column="label",
        class_aliases={name: name for name in _PETS},
        templates=("a photo of a {}, a type of pet.",),
    ),
    Task(
        "stl10",
        path="tanganke/stl10",
        test="test",
        class_names=_STL10,
        templates=("a photo of a {}.", "a photo of the {}."),
    ),
    Task(
        "food101",
        path="ethz/food101",
        test="validation",
        templates=("a photo of {}, a type of food.",),
    ),
    Task(
        "emnist_letters",
        path="tanganke/emnist_letters",
        test="test",
        class_names=tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
        templates=('a photo of the digit character: "{}".',),
    ),
    Task("kmnist", path="tanganke/kmnist", test="test", class_names=_KANA, templates=("a photo of the character {}.",)),
    Task(
        "rendered_sst2",
        path="nateraw/rendered-sst2",
        test="test",
        class_names=("negative", "positive"),
        templates=("a {} review of a movie.",),
    ),
)
_KNOWN_MORE = {
    "cifar100": IMAGE_TASKS["cifar100"],
    "cifar10": IMAGE_TASKS["cifar10"],
    "fashion_mnist": replace(
        IMAGE_TASKS["fashion_mnist"],
        class_names=("T - shirt / top", *(IMAGE_TASKS["fashion_mnist"].class_names or ())[1:]),
        class_aliases=None,
    ),
}
_IMAGES: dict[str, Task] = {
    **{name: IMAGE_TASKS[name] for name in _TA8},
    **_KNOWN_MORE,
    **{task.name: _numbered(task) for task in _MORE},
}
_TALL14 = (*_TA8, "oxford_flowers102", "pcam", "fer2013", "oxford_iiit_pet", "stl10", "cifar100")
_TALL20 = (*_TALL14, "cifar10", "food101", "fashion_mnist", "emnist_letters", "kmnist", "rendered_sst2")


def _flan(name: str, template: str, *label_words: str) -> Task:
    """A GLUE task as FusionBench puts it to Flan-T5; tested on the official validation set."""
    columns = {"qnli": ("question", "sentence")}.get(name) or TEXT_TASKS[name].input_columns
    return Task(
        name,
        path="nyu-mll/glue",
        config=name,
        test="validation_matched" if name == "mnli" else "validation",
        input_columns=columns,
        template=template,
        label_words=label_words or None,
        class_names=label_words or None,
        target_column=None if label_words else "label",
        metric="exact_match" if label_words else "spearman",
    )


_GLUE8: tuple[Task, ...] = (
    _flan(
        "cola",
        "Indicate if the following sentence is grammatically correct or not: \"{sentence}\". Answere 'acceptable' or "
        "'unacceptable'.",
        *("unacceptable", "acceptable"),
    ),
    _flan(
        "mnli",
        "Does the premise: '{premise}' logically imply, contradict, or is neutral to the hypothesis: '{hypothesis}'? "
        "Answere with 'entailment', 'contradiction', or 'neutral'.",
        *("entailment", "neutral", "contradiction"),
    ),
    _flan(
        "mrpc",
        "Are the following sentences '{sentence1}' and '{sentence2}' conveying the same meaning? Answere with 'yes' or "
        "'no'.",
        *("no", "yes"),
    ),
    _flan(
        "qnli",
        "Given the context: '{sentence}', does the question '{question}' have an answer based on the information "
        "provided? Answer with 'yes' or 'no'.",
        *("yes", "no"),
    ),
    _flan(
        "qqp",
        "Do the questions '{question1}' and '{question2}' have the same intent? Answere with 'yes' or 'no'.",
        *("no", "yes"),
    ),
    _flan(
        "rte",
        "Does the text: '{sentence1}' entail that '{sentence2}' is true? Provide 'yes' or 'no'.",
        *("yes", "no"),
    ),
    _flan(
        "sst2",
        "Given the sentence '{sentence}', determine the sentiment. Is it positive or negative?",
        *("negative", "positive"),
    ),
    _flan(
        "stsb",
        "Consider the sentences '{sentence1}' and '{sentence2}'. On a scale from 1 (completely different) to 5 "
        "(completely similar), rate the similarity.",
    ),
)

IMAGE_SUITES: dict[str, dict[str, Task]] = {
    name: {task: _IMAGES[task] for task in tasks}
    for name, tasks in (("ta8", _TA8), ("tall14", _TALL14), ("tall20", _TALL20))
}
TEXT_SUITES: dict[str, dict[str, Task]] = {"glue8": {task.name: task for task in _GLUE8}}


def tasks_of(suite: str | None, suites: Mapping[str, Mapping[str, Task]]) -> dict[str, Task]:
    """The tasks of a suite by name; none without one.

    Raises:
        InputError: no such suite.
    """
    if suite is None:
        return {}
    if suite not in suites:
        raise InputError(f"data.suite: no such suite {suite!r}; {did_you_mean(suite, suites)}")
    return dict(suites[suite])


def check_within(suite: str | None, tasks: Mapping[str, Task], known: Mapping[str, Task]) -> None:
    """Raise if tasks are given that are none of a suite.

    Raises:
        InputError: with their names.
    """
    if suite is not None and (others := [name for name in tasks if name not in known]):
        raise InputError(
            f"data.tasks: {name_list(others)} are not of the suite {suite} ({', '.join(known)}); leave out one or the "
            f"other"
        )


def told_missing(suite: str, missing: Mapping[str, str], reason: str) -> str:
    """What to say where sets of a suite cannot be had.

    Args:
        suite: its name.
        missing: their paths by task.
        reason: why the first one is not.
    """
    first = next(iter(missing))
    sets = ", ".join(f"{task} ({path})" for task, path in missing.items())
    return (
        f"data.suite {suite}: {len(missing)} of its sets are neither here nor to be had: {sets}. What was "
        f"wrong: {reason} Give folders in their place, as data.tasks [{{name: {first}, path: FOLDER}}, ...], which "
        f"may be fewer tasks."
    )
