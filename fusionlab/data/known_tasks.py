"""Tasks known by name: where they are on the hub, what their classes are called, how they are asked for.

The image templates (but for Fashion-MNIST's and SVHN's), and the class names of GTSRB and EuroSAT, are those published
with CLIP (openai/CLIP, ``data/prompts.md``, MIT licence). The GLUE formats are those of arXiv 2310.04742; the
natural-language prompts are this package's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusionlab.data.tasks import Task

DEFAULT_TEMPLATES = ("a photo of a {}.",)
"""Prompts of a task that says none."""

_DIGITS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
_NUMBER = ('a photo of the number: "{}".',)
_CIFAR = tuple(
    template.replace("ARTICLE", article)
    for article in ("a", "the")
    for template in (
        *("a photo of ARTICLE {}.", "a blurry photo of ARTICLE {}.", "a black and white photo of ARTICLE {}."),
        *("a low contrast photo of ARTICLE {}.", "a high contrast photo of ARTICLE {}."),
        *("a bad photo of ARTICLE {}.", "a good photo of ARTICLE {}."),
        *("a photo of ARTICLE small {}.", "a photo of ARTICLE big {}."),
    )
)
_AERIAL = tuple(
    f"{view} {kind} of {article}{{}}."
    for article in ("", "a ", "the ")
    for kind in ("imagery", "photo", "view")
    for view in ("satellite", "aerial")
)
_SIGNS = (
    "red and white circle 20 kph speed limit",
    "red and white circle 30 kph speed limit",
    "red and white circle 50 kph speed limit",
    "red and white circle 60 kph speed limit",
    "red and white circle 70 kph speed limit",
    "red and white circle 80 kph speed limit",
    "end / de-restriction of 80 kph speed limit",
    "red and white circle 100 kph speed limit",
    "red and white circle 120 kph speed limit",
    "red and white circle red car and black car no passing",
    "red and white circle red truck and black car no passing",
    "red and white triangle road intersection warning",
    "white and yellow diamond priority road",
    "red and white upside down triangle yield right-of-way",
    "stop",
    "empty red and white circle",
    "red and white circle no truck entry",
    "red circle with white horizonal stripe no entry",
    "red and white triangle with exclamation mark warning",
    "red and white triangle with black left curve approaching warning",
    "red and white triangle with black right curve approaching warning",
    "red and white triangle with black double curve approaching warning",
    "red and white triangle rough / bumpy road warning",
    "red and white triangle car skidding / slipping warning",
    "red and white triangle with merging / narrow lanes warning",
    "red and white triangle with person digging / construction / road work warning",
    "red and white triangle with traffic light approaching warning",
    "red and white triangle with person walking warning",
    "red and white triangle with child and person walking warning",
    "red and white triangle with bicyle warning",
    "red and white triangle with snowflake / ice warning",
    "red and white triangle with deer warning",
    "white circle with gray strike bar no speed limit",
    "blue circle with white right turn arrow mandatory",
    "blue circle with white left turn arrow mandatory",
    "blue circle with white forward arrow mandatory",
    "blue circle with white forward or right turn arrow mandatory",
    "blue circle with white forward or left turn arrow mandatory",
    "blue circle with white keep right arrow mandatory",
    "blue circle with white keep left arrow mandatory",
    "blue circle with white arrows indicating a traffic circle",
    "white circle with gray strike bar indicating no passing for cars has ended",
    "white circle with gray strike bar indicating no passing for trucks has ended",
)
_LAND_USE = {
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road",
    "Industrial": "industrial buildings or commercial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings or homes or apartments",
    "River": "river",
    "SeaLake": "lake or sea",
}
_PHOTOS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

IMAGE_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("mnist", path="ylecun/mnist", class_names=_DIGITS, templates=_NUMBER),
        Task("svhn", path="ufldl-stanford/svhn", config="cropped_digits", class_names=_DIGITS, templates=_NUMBER),
        Task(
            "fashion_mnist",
            path="zalando-datasets/fashion_mnist",
            class_names=_CLOTHES,
            class_aliases={"T - shirt / top": "T-shirt/top"},
            templates=("a photo of a {}.", "a photo of the {}."),
        ),
        Task("cifar10", path="uoft-cs/cifar10", class_names=_PHOTOS, templates=_CIFAR),
        Task(
            "cifar100",
            path="uoft-cs/cifar100",
            label_column="fine_label",
            class_aliases={"cra": "crab"},
            templates=_CIFAR,
        ),
        Task(
            "stanford_cars",
            path="tanganke/stanford_cars",
            templates=(
                *("a photo of a {}.", "a photo of the {}.", "a photo of my {}.", "i love my {}!"),
                *(
                    "a photo of my dirty {}.",
                    "a photo of my clean {}.",
                    "a photo of my new {}.",
                    "a photo of my old {}.",
                ),
            ),
        ),
        Task(
            "dtd",
            path="tanganke/dtd",
            templates=tuple(
                f"a photo of {article} {{}} {noun}."
                for article in ("a", "the")
                for noun in ("texture", "pattern", "thing", "object")
            ),
        ),
        Task(
            "eurosat",
            path="tanganke/eurosat",
            class_names=tuple(_LAND_USE.values()),
            class_aliases=_LAND_USE,
            templates=tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")),
        ),
        Task(
            "gtsrb",
            path="tanganke/gtsrb",
            class_names=_SIGNS,
            templates=tuple(
                f'a {view} photo of a "{{}}" traffic sign.' for view in ("zoomed in", "centered", "close up")
            ),
        ),
        Task("resisc45", path="tanganke/resisc45", templates=_AERIAL),
        Task("sun397", path="tanganke/sun397", templates=("a photo of a {}.", "a photo of the {}.")),
    )
}
"""The seven tasks of arXiv 2310.04742, MNIST (with them the usual eight of the merging literature), and three more."""

_PAIR = ("sentence1", "sentence2")


def _glue(
    name: str,
    columns: tuple[str, ...],
    *label_words: str,
    template: str | None = None,
    test: str = "validation",
    target_column: str | None = None,
) -> Task:
    """A GLUE task in the paper's format: the task's name, then each column's name and text.

    GLUE's test labels are secret, so the official validation set is what is tested on.
    """
    return Task(
        name,
        path="nyu-mll/glue",
        config=name,
        test=test,
        input_columns=columns,
        template=template or f"{name} " + " ".join(f"{column}: {{{column}}}" for column in columns),
        label_words=label_words or None,
        class_names=label_words or None,
        target_column=target_column,
        metric="accuracy" if label_words else "spearman",
    )


TEXT_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _glue("cola", ("sentence",), "unacceptable", "acceptable"),
        _glue(
            "mnli",
            ("premise", "hypothesis"),
            *("entailment", "neutral", "contradiction"),
            template="mnli hypothesis: {hypothesis} premise: {premise}",
            test="validation_matched",
        ),
        _glue("mrpc", _PAIR, "not_equivalent", "equivalent"),
        _glue("qqp", ("question1", "question2"), "not_duplicate", "duplicate"),
        _glue("rte", _PAIR, "entailment", "not_entailment"),
        _glue("sst2", ("sentence",), "negative", "positive"),
        _glue("stsb", _PAIR, target_column="label"),
    )
}
"""The seven GLUE tasks of arXiv 2310.04742, in its text-to-text format."""


@dataclass(frozen=True)
class Prompt:
    """Another way to ask for a known text task: its text and, in label order, its answers (None for a score)."""

    template: str
    label_words: tuple[str, ...] | None

    def applied(self, task: Task) -> Task:
        """The task, asked for in this way."""
        return replace(task, template=self.template, label_words=self.label_words)


NATURAL_PROMPTS: dict[str, Prompt] = {
    "cola": Prompt('Is this sentence acceptable English? "{sentence}" Answer yes or no.', ("no", "yes")),
    "mnli": Prompt(
        'Assume that "{premise}" Is it then true that "{hypothesis}"? Answer yes, maybe or no.', ("yes", "maybe", "no")
    ),
    "mrpc": Prompt('Do "{sentence1}" and "{sentence2}" say the same? Answer yes or no.', ("no", "yes")),
    "qqp": Prompt('Do "{question1}" and "{question2}" ask the same? Answer yes or no.', ("no", "yes")),
    "rte": Prompt('Given that "{sentence1}" Does it follow that "{sentence2}"? Answer yes or no.', ("yes", "no")),
    "sst2": Prompt('Is this review positive or negative? "{sentence}"', ("negative", "positive")),
    "stsb": Prompt(
        'From 0.0 (nothing in common) to 5.0 (the same), how alike in meaning are "{sentence1}" and "{sentence2}"?',
        None,
    ),
}
"""Natural-language prompts of the GLUE tasks."""
