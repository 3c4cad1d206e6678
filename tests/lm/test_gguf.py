"""A GGUF file as backbone: dequantized, written once, and what adapters then point to."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusionlab.__main__ import main
from fusionlab.errors import InputError
from fusionlab.modules import CausalModule

gguf = pytest.importorskip("gguf")
# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def file(causal_folder: Callable[[str], Path], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in GGUF as llama.cpp writes it: 8-bit blocks of 32, q and k permuted."""
    model = AutoModelForCausalLM.from_pretrained(causal_folder("llama"))
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokenizer))
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, value in model.state_dict().items():
        array = value.numpy()
        if name == "lm_head.weight":
            continue
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            part = rest.removesuffix(".weight")
            heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
            if part in heads:
                array = array.reshape(heads[part], 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            own = f"blk.{layer}.{names[part]}.weight"
        else:
            own = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        if array.ndim == 1 or array.shape[1] % 32:
            writer.add_tensor(own, array.astype(np.float32))
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(own, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_is_dequantized_and_says_so(
    file: Path, causal_folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        module = CausalModule(str(file))
    assert "is dequantized to float32" in caplog.text
    original = AutoModelForCausalLM.from_pretrained(causal_folder("llama")).state_dict()
    for name, value in module.base_model.state_dict().items():
        # blocks of 8 bits: at most half a step of 1/127 of a block's largest value
        assert (value - original[name]).abs().max() <= original[name].abs().max() / 200 + 1e-6
    text = module.backbone.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert text == "<|im_start|>user\nx<|im_end|>\n"


def test_a_run_writes_the_base_once_and_its_adapters_point_there(file: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    from fusionlab import load

    rows = [{"prompt": f"film {i}:", "completion": " yes" if i % 2 else " no"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = json.dumps([{"name": "film", "path": str(tmp_path / "rows.jsonl")}])
    flags = ["--model", "CausalModule", "--model.backbone", str(file), "--data", "ChatTasks", "--data.tasks", tasks]
    flags += ["--data.cache_dir", str(tmp_path / "cache")]
    root = tmp_path / "run"
    argv = ["fit", *flags, "--trainer.max_steps", "2", "--fusion.rules", "[average]"]
    assert main([*argv, "--trainer.default_root_dir", str(root), "--trainer.enable_progress_bar", "false"]) == 0
    config = json.loads((root / "adapters" / "film" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(root / "base")
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    AutoTokenizer.from_pretrained(root / "base")
    module = CausalModule(str(file))
    ids = torch.arange(40, 60)[None]
    with torch.no_grad(), module.use(load(root / "adapters" / "film")):
        expected = module.backbone.logits(ids)
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, root / "adapters" / "film").eval()(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    argv = ["test", *flags, "--model.weights", str(root / "fused" / "average")]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "test")]) == 0


@pytest.mark.parametrize("content", [b"", b"not a gguf file at all", None])
def test_what_is_no_gguf_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.gguf"):
        CausalModule(str(path))
