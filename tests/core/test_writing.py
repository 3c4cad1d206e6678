"""The embedded text tasks: the same on every run, balanced, disjoint splits, and labels that the texts bear out."""

from collections import Counter

import numpy as np
import pytest

from fusionlab.data.known_tasks import TEXT_TASKS
from fusionlab.data.writing import SPLIT_SIZES, WRITTEN_TASKS, forms
from fusionlab.data.writing.sentences import Event, denied, spoiled, tell
from fusionlab.data.writing.words import BLAME, DEEDS, PEOPLE, PLACES, PRAISE, QUALITIES, STEMS, THINGS
from fusionlab.errors import InputError

# The GLUE task that each mirrors; the label words are the same.
MIRRORED = {
    "acceptability": "cola",
    "sentiment": "sst2",
    "paraphrase": "mrpc",
    "duplicate": "qqp",
    "entailment": "rte",
    "inference": "mnli",
    "similarity": "stsb",
}
SENSE = {word: words[0] for words in (*PEOPLE, *THINGS, *DEEDS) for word in words}


def senses(sentence: str) -> set[str]:
    """What a sentence is about, synonyms made equal."""
    return {SENSE[word] for word in sentence.split() if word in SENSE}


def test_seven_tasks_mirror_glue():
    assert list(WRITTEN_TASKS) == list(MIRRORED)
    for name, glue in MIRRORED.items():
        task = WRITTEN_TASKS[name]
        assert task.label_words == TEXT_TASKS[glue].label_words
        assert task.metric == TEXT_TASKS[glue].metric
        assert task.input_columns == TEXT_TASKS[glue].input_columns
    assert WRITTEN_TASKS["duplicate"].template == "duplicate question1: {question1} question2: {question2}"
    assert WRITTEN_TASKS["similarity"].target_column == "score"
    assert WRITTEN_TASKS["sentiment"].target_column is None


@pytest.mark.parametrize("name", MIRRORED)
def test_splits_are_balanced_deterministic_and_disjoint(name):
    task, seen = WRITTEN_TASKS[name], set()
    for split, size in SPLIT_SIZES.items():
        rows, labels = task.rows(split)
        assert (rows, labels) == task.rows(split)
        assert len(rows) == len(labels) == size
        assert all(set(row) == set(task.input_columns) for row in rows)
        texts = {task.template.format(**row) for row in rows}
        assert len(texts) == size
        assert not texts & seen
        seen |= texts
        if task.label_words:
            counts = Counter(labels)
            assert set(counts) == set(range(len(task.label_words)))
            assert max(counts.values()) - min(counts.values()) <= 1


def test_scores_run_from_0_to_5_in_single_decimals():
    _, scores = WRITTEN_TASKS["similarity"].rows("train")
    assert min(scores) == 0.0
    assert max(scores) == 5.0
    assert all(isinstance(score, float) and float(f"{score:.1f}") == score for score in scores)
    assert sorted(set(scores)) == [0.0, 1.2, 2.5, 3.8, 5.0]


def test_similar_sentences_share_as_many_parts_as_the_score_says():
    rows, scores = WRITTEN_TASKS["similarity"].rows("test")
    for row, score in zip(rows, scores, strict=True):
        first, second = row["sentence1"], row["sentence2"]
        places = sum(place in first and place in second for place in PLACES)
        assert score == forms.SCORES[len(senses(first) & senses(second)) + places], row


def test_paraphrases_keep_every_sense_and_others_do_not():
    rows, labels = WRITTEN_TASKS["paraphrase"].rows("test")
    for row, label in zip(rows, labels, strict=True):
        assert row["sentence1"] != row["sentence2"]
        assert (senses(row["sentence1"]) == senses(row["sentence2"])) == bool(label), row


def test_sentiment_follows_the_last_verdict():
    rows, labels = WRITTEN_TASKS["sentiment"].rows("test")
    for row, label in zip(rows, labels, strict=True):
        words = row["sentence"].split()
        at = max(i for i, word in enumerate(words) if word in PRAISE + BLAME)
        negated = words[at - 1] in ("not", "never", "hardly")
        assert ((words[at] in PRAISE) != negated) == bool(label), row


def test_entailed_texts_add_no_sense():
    rows, labels = WRITTEN_TASKS["entailment"].rows("test")
    kinds = ("a vehicle", "a piece of")
    plain = [
        (row, label) for row, label in zip(rows, labels, strict=True) if not any(k in row["sentence2"] for k in kinds)
    ]
    assert len(plain) > 200
    assert all(senses(row["sentence2"]) <= senses(row["sentence1"]) for row, label in plain if label == 0)
    added = [not senses(row["sentence2"]) <= senses(row["sentence1"]) for row, label in plain if label == 1]
    assert np.mean(added) > 0.85  # the others borrow from the other half of the premise


def test_contradictions_deny_or_oppose():
    opposite = {a: b for pair in QUALITIES for a, b in (pair, pair[::-1])}
    rows, labels = WRITTEN_TASKS["inference"].rows("test")
    for row, label in zip(rows, labels, strict=True):
        premise, hypothesis = row["premise"].split(), row["hypothesis"].split()
        denies = bool({"not", "never"} & set(hypothesis))
        opposes = any(opposite.get(word) in premise for word in hypothesis[-2:])
        assert (denies or opposes) == (label == 2), row


def test_sound_and_spoiled_sentences_differ_by_one_fault():
    rng = np.random.default_rng(0)
    for _ in range(200):
        sentence = tell(rng, Event(PEOPLE[0], DEEDS[0], THINGS[0], "on the hill", "yesterday", "old"))
        assert spoiled(rng, sentence) != sentence


def test_one_event_has_many_tellings_of_one_sense():
    rng = np.random.default_rng(0)
    event = Event(("doctor",), ("bought",), ("car",), "on the hill")
    told = {tell(rng, event) for _ in range(100)}
    assert told == {
        "the doctor bought the car on the hill",
        "on the hill , the doctor bought the car",
        "the car was bought by the doctor on the hill",
        "on the hill , the car was bought by the doctor",
    }
    assert {denied(rng, event) for _ in range(50)} == {
        "the doctor did not buy the car",
        "the doctor never bought the car",
    }


@pytest.mark.parametrize(("shared", "score"), [(0, 0.0), (1, 1.2), (8, 1.2), (5, 2.5), (7, 3.8), (15, 5.0)])
def test_similarity_score_counts_what_is_shared(shared, score):
    assert forms.similarity_score(shared) == score


def test_every_deed_has_a_stem():
    assert {word for words in DEEDS for word in words} == set(STEMS)


def test_unknown_split_is_refused():
    with pytest.raises(InputError, match=r"'vaildation'.*did you mean 'validation'"):
        WRITTEN_TASKS["sentiment"].rows("vaildation")
