"""The script that makes the quickstart's target, shortened."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "make_quickstart_target.py"


def test_a_shortened_run_writes_a_target_that_loads_and_has_learned_something(tmp_path: Path) -> None:
    output = tmp_path / "target"
    command = [sys.executable, str(SCRIPT), "--small", "--steps", "25", "--device", "cpu", "--rows-per-step", "8"]
    command += ["--num-prompts", "4", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout[done.stdout.rindex("\n{") :])
    assert result["prompts"] == 4
    assert 0 <= result["repeated 4-grams"] <= 1

    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.config.model_type == "qwen3"
    assert model.config.tie_word_embeddings
    assert model.config.vocab_size - len(tokenizer) == 64  # rows without a token: a block draft's mask is one
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What does json.dumps do?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nWhat does json.dumps do?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in model.generation_config.eos_token_id] == ["<|im_end|>", "<|endoftext|>"]
    with torch.no_grad():
        first = float(model(torch.tensor([ids])).logits[0, -1].softmax(-1)[tokenizer.encode("```")[0]])
    assert first > 3 / model.config.vocab_size  # many answers begin so
