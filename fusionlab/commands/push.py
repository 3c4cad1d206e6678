"""``python -m fusionlab push FOLDER --repo OWNER/NAME``: a folder of weights to the hub."""

from __future__ import annotations

import logging
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionlab.commands.parser import parse, with_flag
from fusionlab.errors import InputError, name_list
from fusionlab.files import accessed, is_there, path_of
from fusionlab.foreign.cards import card_head
from fusionlab.layout import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    CARD,
    CONFIG,
    FUSION,
    MASKS,
    OWN,
    ROUTED,
    ROUTED_OWN,
    SWEEP,
    UNIFIED,
)

if TYPE_CHECKING:
    from fusionlab.commands.published import Sent

_SWITCHES = {
    "private": "make the repository private where it does not exist yet",
    "dry_run": "check the folder, list what would be sent, and stop; the hub is not asked",
}
_REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_TOKEN = re.compile(r"[!-~]+")
_RECORDS = (CARD, FUSION, OWN, ADAPTER_CONFIG)
_INDEX = "*.safetensors.index.json"


@dataclass(frozen=True)
class PushRecipe:
    """Send a folder of weights to the hub: its card, safetensors, configurations and tokenizer, and nothing else.

    Places of this machine that its records name are sent as bare names, and told; the folder itself stays as it is.
    Give the same command again after a broken one: what the hub has is not sent again.

    Args:
        folder: an adapter's, a fused model's or a fine-tuned model's folder; also given without the flag.
        repo: OWNER/NAME of the repository, which is made where it does not exist.
        base: the base's id on the hub, OWNER/NAME, where the folder names a folder of this machine instead.
        revision: the branch to send to, the main one by default.
        message: of the commit.
        private: make the repository private where it does not exist yet.
        dry_run: check the folder, list what would be sent, and stop.
    """

    folder: str
    repo: str
    base: str | None = None
    revision: str | None = None
    message: str | None = None
    private: bool = False
    dry_run: bool = False


def main(argv: list[str]) -> int:
    """Send a folder; returns 0.

    Raises:
        InputError: a folder that is none of weights, no token, or what the hub refuses, with what to do.
    """
    recipe = parse(PushRecipe, with_flag(argv, "folder", switches=_SWITCHES), "push", _SWITCHES)
    folder = path_of(recipe.folder)
    files = files_to_push(folder)
    if not _REPO.fullmatch(recipe.repo):
        raise InputError(f"--repo {recipe.repo!r}: expected OWNER/NAME")
    from fusionlab.commands.published import Publisher  # seconds, which --help need not wait for

    sent = Publisher(folder, recipe.base).sent(files)
    for note in (*_notes(folder, recipe.base), *_rewritten(sent)):
        print(f"note: {note}")
    if recipe.dry_run:
        print("\n".join(_plan(recipe, folder, files, sent)))
        return 0
    with _staged(folder, files, sent) as staged:
        print(f"pushed {len(files)} files: {_push(recipe, folder, staged)}")
    return 0


def files_to_push(folder: Path) -> list[str]:
    """What of a folder belongs on the hub, by relative path, sorted.

    That is the card, safetensors with their index, configurations, tokenizer and licences; no checkpoints, optimizer
    states, logs or pickles.

    Raises:
        InputError: no folder of weights, one without a card or safetensors, or weights that are not whole.
    """
    from fusionlab.adapters.routed_files import load_routed
    from fusionlab.tensors import open_checkpoint
    from fusionlab.tensors.companions import carried_files
    from fusionlab.tensors.headers import read_header

    _check_folder(folder)
    if is_there(folder / ADAPTER_CONFIG):
        weights = [ADAPTER_MODEL]
        if not is_there(folder / ADAPTER_MODEL):
            raise InputError(f"{str(folder)!r} has no {ADAPTER_MODEL}; only safetensors are sent")
        read_header(folder / ADAPTER_MODEL)
    elif is_there(folder / MASKS) or is_there(folder / UNIFIED):
        weights = [UNIFIED, MASKS]
        for name in weights:
            read_header(folder / name)
    elif is_there(folder / ROUTED_OWN) or is_there(folder / ROUTED):
        weights = [ROUTED, ROUTED_OWN]
        load_routed(folder)
    else:
        checkpoint = open_checkpoint(folder)
        weights = [file.relative_to(folder).as_posix() for file in checkpoint.files]
        if pickled := [name for name in weights if not name.endswith(".safetensors")]:
            raise InputError(f"{str(folder)!r}: only safetensors are sent, and its weights are {name_list(pickled)}")
        weights += [path.name for path in folder.glob(_INDEX)]
    records = [name for name in _RECORDS if is_there(folder / name)]
    card_head(folder / CARD)  # the hub refuses one that it cannot read, after all else was sent
    return sorted({*weights, *records, *carried_files(folder)})


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"no folder {str(folder)!r}; give an adapter's, a fused or a fine-tuned model's folder")
    with accessed(folder):
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if is_there(folder / CONFIG):
        raise InputError(
            f"{str(folder)!r} is a run folder, with {name_list(inside)}; give one model's folder, such as fused/RULE"
        )
    if is_there(folder / SWEEP):
        raise InputError(f"{str(folder)!r} is a sweep's folder; give one model's, such as runs/RUN/fused/RULE in it")
    if not is_there(folder / CARD):
        raise InputError(f"{str(folder)!r} has no {CARD}; fusionlab writes one beside all weights: make them anew")


def _notes(folder: Path, base: str | None) -> Iterator[str]:
    """What a reader elsewhere could not use."""
    from fusionlab.commands.published import base_of, cached_id, is_path
    from fusionlab.tensors.hub import embedded

    if base is not None:
        missing, own = ["license"], ""
    else:
        missing, own = ["license", "base_model"], base_of(folder)
    head = card_head(folder / CARD)
    if missing := [key for key in missing if not head.get(key)]:
        yield f"{CARD} names no {' and no '.join(missing)}; add what is missing to its head"
    if embedded(own) is not None:
        yield f"the base {own!r} comes with fusionlab, and others do not find it under that name"
    elif is_path(own) and cached_id(own) is None:
        yield (
            f"the base {own!r} is a folder of this machine, which others do not have; where it is on the hub, give "
            f"--base OWNER/NAME"
        )


def _rewritten(sent: Mapping[str, Sent]) -> Iterator[str]:
    for name, other in sent.items():
        told = name_list([f"{new!r} for {old!r}" for old, new in other.instead.items()], 3)
        yield f"{name} is sent otherwise than it is here: {told}"


def _plan(recipe: PushRecipe, folder: Path, files: list[str], sent: Mapping[str, Sent]) -> Iterator[str]:
    sizes = {name: (folder / name).stat().st_size for name in files}
    sizes |= {name: len(other.content.encode()) for name, other in sent.items()}
    kind = "private, where it is new" if recipe.private else "public, where it is new"
    yield f"would send {len(files)} files, {sum(sizes.values()) / 1e6:.2f} MB, to {recipe.repo} ({kind}):"
    for name, size in sizes.items():
        yield f"  {name}  {size:,} bytes{', rewritten' if name in sent else ''}"
    left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    if left := [name for name in left if name not in sizes]:
        yield f"not sent: {name_list(left, 20)}"
    yield "nothing was sent (--dry_run)."


@contextmanager
def _staged(folder: Path, files: list[str], sent: Mapping[str, Sent]) -> Iterator[Path]:
    """A folder of links to the files, with what is sent otherwise in their place."""
    with tempfile.TemporaryDirectory() as made:
        for name in files:
            path = Path(made, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if name in sent:
                path.write_text(sent[name].content, encoding="utf-8")
            else:
                path.symlink_to((folder / name).resolve())
        yield Path(made)


def _push(recipe: PushRecipe, folder: Path, staged: Path) -> str:
    """Send what is staged in one commit; returns its address."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    from fusionlab.tensors.hub_refusals import hub_errors, hub_refusal

    token = get_token()
    if token is None:
        raise InputError("no token for the hub: log in (hf auth login), or set HF_TOKEN to a token that may write")
    if not _TOKEN.fullmatch(token):  # the error of who sends it would show it
        raise InputError("the hub's token holds characters that no token has; set HF_TOKEN anew")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are told once, in the end
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(token=token, library_name="fusionlab")
    try:
        _check_visibility(api, recipe)
        api.create_repo(recipe.repo, private=recipe.private, exist_ok=True)
        if recipe.revision is not None:
            api.create_branch(recipe.repo, branch=recipe.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=recipe.repo,
            folder_path=staged,
            revision=recipe.revision,
            commit_message=recipe.message or f"{folder.name} by fusionlab",
        )
    except (*hub_errors(), RuntimeError) as error:
        reason = hub_refusal(error) or _refused_by_name(error)
        if reason is None:
            raise
        raise InputError(
            f"push to {recipe.repo!r}: {reason.replace(token, '***')}. Files that came whole stay on the hub: give the "
            f"same command again"
        ) from None  # the chain below has the request's headers
    return str(commit.commit_url)


def _check_visibility(api: Any, recipe: PushRecipe) -> None:
    """Refuse to send to a public repository what is meant to be private.

    Raises:
        InputError: it exists and is public.
    """
    from huggingface_hub.errors import HfHubHTTPError

    from fusionlab.tensors.hub_refusals import status_of

    if not recipe.private:
        return
    try:
        info = api.repo_info(recipe.repo)
    except HfHubHTTPError as error:
        if status_of(error) in (401, 404):  # it does not exist yet; who may not make it is told when it is made
            return
        raise
    if not info.private:
        raise InputError(
            f"{recipe.repo!r} exists and is public; make it private in its settings, or leave --private out"
        )


def _refused_by_name(error: BaseException) -> str | None:
    """What huggingface_hub says of cards and files by itself."""
    text = " ".join(str(error).split())
    return text[:300] if type(error) is ValueError and text.startswith(("- Error in README", "LFS batch API")) else None
