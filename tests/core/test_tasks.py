"""Names and mappings become tasks; every mistake has its one message."""

import pytest

from fusionlab.data.known_tasks import IMAGE_TASKS
from fusionlab.data.tasks import Task, parse_tasks
from fusionlab.errors import InputError

KNOWN = {
    "mnist": Task("mnist", path="ylecun/mnist", class_names=("zero", "one"), templates=("a {}.",), label_column="y"),
    "dtd": Task("dtd", path="tanganke/dtd"),
}


def test_a_name_is_its_definition() -> None:
    assert parse_tasks(["dtd"], KNOWN) == {"dtd": KNOWN["dtd"]}
    assert parse_tasks(["mnist"], KNOWN)["mnist"].templates == ("a {}.",)


def test_class_names_are_left_to_the_data() -> None:
    assert parse_tasks(["mnist"], KNOWN)["mnist"].class_names is None


def test_a_mapping_changes_what_it_says() -> None:
    task = parse_tasks([{"name": "mnist", "templates": ["{}!"]}], KNOWN)["mnist"]
    assert task == Task("mnist", "ylecun/mnist", templates=("{}!",), label_column="y")


def test_a_path_of_ones_own_keeps_prompts_but_not_the_layout() -> None:
    task = parse_tasks([{"name": "mnist", "path": "here"}], KNOWN)["mnist"]
    assert task == Task("mnist", "here", templates=("a {}.",))


def test_order_is_kept_and_tasks_pass_through() -> None:
    own = Task("own", path="folder")
    assert list(parse_tasks(["dtd", own, "mnist"], KNOWN)) == ["dtd", "own", "mnist"]
    assert parse_tasks([own], KNOWN)["own"] is own


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["mnsit"], r"unknown task 'mnsit'; did you mean 'mnist'\?"),
        ([{"name": "new"}], r"unknown task 'new'; known: mnist, dtd; .* \{name: new, path: FOLDER or hub id\}"),
        ([{"name": "a", "pathh": "b"}], r"unknown key 'pathh' in task 'a'; did you mean 'path'\?"),
        ([{"path": "b"}], r"task \{'path': 'b'\} has no name"),
        (["mnist", {"name": "mnist", "path": "b"}], r"task name 'mnist' is used twice"),
        (["mnist", {"name": "MNIST", "path": "b"}], r"task name 'MNIST' is used twice"),
        ([], r"tasks is empty"),
        ("mnist", r"tasks must be a list of names or mappings, got 'mnist'"),
        ([3], r"a task is a name or a mapping \{name: \.\.\., path: \.\.\.\}, got 3"),
        ([{"name": "a/b", "path": "c"}], r"task name 'a/b' must begin with a letter or digit"),
        ([{"name": "..", "path": "c"}], r"task name '\.\.' must begin"),
        ([{"name": 3, "path": "c"}], r"name of task 3 must be a string, got 3"),
        ([{"name": "a", "path": 3}], r"path of task 'a' must be a string, got 3"),
        ([{"name": "a", "path": "b", "class_names": {"x": "y"}}], r"class_names of task 'a' must be a list of strings"),
        ([{"name": "a", "path": "b", "class_names": ["x", 1]}], r"class_names of task 'a' .* got \['x', 1\]"),
        ([{"name": "a", "path": "b", "class_names": ["x", "y", "x"]}], r"class_names of task 'a' repeat x;"),
        (
            [{"name": "a", "path": "b", "class_aliases": ["x"]}],
            r"class_aliases of task .a. must map strings",
        ),
        ([{"name": "a", "path": "b", "templates": ["a photo"]}], r"template 'a photo' of task 'a' must hold \{\} once"),
        ([{"name": "a", "path": "b", "templates": ["{} {}"]}], r"template '\{\} \{\}' of task 'a' must hold \{\} once"),
    ],
)
def test_mistakes(entries: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_tasks(entries, KNOWN)


def test_the_seven_of_the_paper_and_the_usual_eight_are_known() -> None:
    seven = {"stanford_cars", "dtd", "eurosat", "gtsrb", "resisc45", "sun397", "svhn"}
    assert seven | {"mnist", "cifar10", "cifar100", "fashion_mnist"} == set(IMAGE_TASKS)
    assert all("/" in task.path and task.templates for task in IMAGE_TASKS.values())


@pytest.mark.parametrize(
    ("name", "num_templates", "first", "last"),
    [
        ("cifar10", 18, "a photo of a {}.", "a photo of the big {}."),
        ("stanford_cars", 8, "a photo of a {}.", "a photo of my old {}."),
        ("dtd", 8, "a photo of a {} texture.", "a photo of the {} object."),
        ("eurosat", 3, "a centered satellite photo of {}.", "a centered satellite photo of the {}."),
        ("gtsrb", 3, 'a zoomed in photo of a "{}" traffic sign.', 'a close up photo of a "{}" traffic sign.'),
        ("resisc45", 18, "satellite imagery of {}.", "aerial view of the {}."),
        ("sun397", 2, "a photo of a {}.", "a photo of the {}."),
        ("mnist", 1, 'a photo of the number: "{}".', 'a photo of the number: "{}".'),
    ],
)
def test_templates_are_those_of_clip(name: str, num_templates: int, first: str, last: str) -> None:
    templates = IMAGE_TASKS[name].templates
    assert (len(set(templates)), templates[0], templates[-1]) == (num_templates, first, last)


def test_there_are_forty_three_signs() -> None:
    signs = IMAGE_TASKS["gtsrb"].class_names
    assert (len(signs), signs[14], signs[17]) == (43, "stop", "red circle with white horizonal stripe no entry")
