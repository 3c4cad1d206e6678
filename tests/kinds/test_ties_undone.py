"""What undoes a tie: both tensors are written, the configuration says so, and what cannot be told is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusionlab.__main__ import main
from fusionlab.engine import StateWeights, TaskInput
from fusionlab.tensors.architecture import Tie
from fusionlab.tensors.identity import Ties

CONFIG = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Llama = transformers.LlamaForCausalLM


def saved(folder: Path, seed: int = 0, **more: Any) -> Path:
    torch.manual_seed(seed)
    Llama(transformers.LlamaConfig(**CONFIG, vocab_size=32, **{"tie_word_embeddings": True} | more)).save_pretrained(
        folder
    )
    return folder


def adapted(base: Path, folder: Path, targets: list[str], seed: int = 1, **more: Any) -> Path:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied layers
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **more)
        peft.get_peft_model(Llama.from_pretrained(base), config).save_pretrained(folder)
    return folder


def fuse(tmp_path: Path, base: Path, rule: str = "average", *flags: str, output: str = "out", **finetuned: Path) -> int:
    inputs = [part for task, path in finetuned.items() for part in (f"--finetuned.{task}", str(path))]
    argv = ["fuse", "--base", str(base), *inputs, "--rule", rule, "--output", str(tmp_path / output), *flags]
    return main(argv)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_two_tied_layers_leaves_the_other_as_it_is(tmp_path: Path, target: str) -> None:
    base = saved(tmp_path / "base")
    given = adapted(base, tmp_path / "a", [target])
    assert fuse(tmp_path, base, "average", "--save", "weights", a=given) == 0
    before, after = weights(base)[EMBEDDING], weights(tmp_path / "out")
    changed, kept = (EMBEDDING, HEAD) if target == "embed_tokens" else (HEAD, EMBEDDING)
    assert torch.equal(after[kept], before)
    assert not torch.allclose(after[changed], before)
    assert config(tmp_path / "out")["tie_word_embeddings"] is False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = peft.PeftModel.from_pretrained(Llama.from_pretrained(base), given)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(Llama.from_pretrained(tmp_path / "out")(ids).logits, live(ids).logits)


def test_an_adapter_that_ties_what_it_changes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved(tmp_path / "base")
    given = adapted(base, tmp_path / "a", ["embed_tokens", "q_proj"], ensure_weight_tying=True)
    assert fuse(tmp_path, base, a=given) == 2
    assert "has ensure_weight_tying=True: what it changes in an embedding" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    plain = adapted(base, tmp_path / "b", ["q_proj"], ensure_weight_tying=True)
    assert fuse(tmp_path, base, b=plain) == 0


def test_a_model_that_has_them_apart_over_a_base_that_stores_both(tmp_path: Path) -> None:
    base, apart = saved(tmp_path / "base"), saved(tmp_path / "a", seed=1, tie_word_embeddings=False)
    save_file(weights(base) | {HEAD: weights(base)[EMBEDDING].clone()}, base / "model.safetensors", {"format": "pt"})
    assert fuse(tmp_path, base, a=apart) == 0
    after = weights(tmp_path / "out")
    for name in (EMBEDDING, HEAD):
        torch.testing.assert_close(after[name], weights(apart)[name])
    assert config(tmp_path / "out")["tie_word_embeddings"] is False


def test_masks_of_an_adapter_on_a_tied_head_hold_on_the_base_that_they_were_made_on(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    first, second = (adapted(base, tmp_path / name, ["lm_head"], seed=seed) for seed, name in enumerate("ab", 1))
    assert fuse(tmp_path, base, "emr", output="masks", a=first, b=second) == 0
    assert fuse(tmp_path, base, a=tmp_path / "masks") == 0
    assert HEAD in weights(tmp_path / "out")


@pytest.mark.parametrize(("tied", "told"), [((True, False), False), ((True, True), True), ((False, False), False)])
def test_a_stack_says_of_its_head_what_it_has(tmp_path: Path, tied: tuple[bool, bool], told: bool) -> None:
    models = [saved(tmp_path / f"m{i}", seed=i, tie_word_embeddings=is_tied) for i, is_tied in enumerate(tied)]
    parts = [{"model": str(model), "layers": [0, 2]} for model in models]
    recipe = {"base": parts, "finetuned": {"stack": parts}, "rule": "passthrough", "output": str(tmp_path / "out")}
    (tmp_path / "stack.yaml").write_text(json.dumps(recipe))
    assert main(["fuse", "--config", str(tmp_path / "stack.yaml")]) == 0
    after = weights(tmp_path / "out")
    assert config(tmp_path / "out")["tie_word_embeddings"] is told
    assert (HEAD in after) is not told
    if HEAD in after:
        assert torch.equal(after[HEAD], weights(models[1])[HEAD])


def test_a_stack_that_its_configuration_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = CONFIG | {"num_hidden_layers": 4, "vocab_size": 32, "num_experts": 2, "num_experts_per_tok": 1}
    sizes |= {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**sizes, mlp_only_layers=[1])).save_pretrained(
        tmp_path / "moe"
    )
    types = {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "hidden_size": 16, "num_heads": 2}
    transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**types, vocab_size=32)).save_pretrained(tmp_path / "neo")
    for model, ranges, code in (
        ("moe", [[0, 3], [1, 4]], 2),
        ("neo", [[0, 3], [1, 4]], 2),
        ("moe", [[0, 2], [2, 4]], 0),
    ):
        parts = [{"model": str(tmp_path / model), "layers": layers} for layers in ranges]
        output = tmp_path / f"{model}{code}"
        recipe = {"base": parts, "finetuned": {"stack": parts}, "rule": "passthrough", "output": str(output)}
        (tmp_path / "stack.yaml").write_text(json.dumps(recipe))
        for dry in (["--dry_run"], []):
            assert main(["fuse", "--config", str(tmp_path / "stack.yaml"), *dry]) == code
            assert ("speak of blocks by number" in capsys.readouterr().err) is (code == 2)
        assert output.exists() is (code == 0)


def test_a_stack_of_a_model_with_tensors_that_loading_ignores(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        saved(tmp_path / name, seed=seed)
    old = weights(tmp_path / "b") | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    save_file(old, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    parts = [{"model": str(tmp_path / name), "layers": [0, 2]} for name in "ab"]
    recipe = {"base": parts, "finetuned": {"stack": parts}, "rule": "passthrough", "output": str(tmp_path / "out")}
    (tmp_path / "stack.yaml").write_text(json.dumps(recipe))
    assert main(["fuse", "--config", str(tmp_path / "stack.yaml")]) == 0


def test_the_configuration_is_not_asked_where_the_base_tells() -> None:
    def fail() -> bool:
        raise AssertionError("asked")

    declared = {HEAD: Tie(EMBEDDING, fail)}
    base, tuned = (StateWeights({EMBEDDING: torch.zeros(2) + i, HEAD: torch.ones(2) + i}) for i in range(2))
    found = Ties.between(declared, base, {"a": TaskInput(tuned)})
    assert (found.possible, found.first, found.apart) == ({}, {}, {})
