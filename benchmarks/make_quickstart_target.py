"""Train the quickstart's target: a tiny Qwen3 on Python's standard library, shipped as package data.

    python benchmarks/make_quickstart_target.py                        # minutes on a GPU
    python benchmarks/make_quickstart_target.py --device cpu --minutes 10 --rows-per-step 16
    python benchmarks/make_quickstart_target.py --small --steps 20 --device cpu --output /tmp/target

Reads sources and documentation of the standard library's group "target"; the best weights are chosen on conversations
of the group "draft"; answers to prompts of the group "held_out" are shown and measured at the end.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # runs from a checkout, installed or not

from paceline.data.completion import Prompt
from paceline.data.stdlib_conversations import make_conversations, read_sources
from paceline.target.hf.generation import Generator

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNUSED_TOKENS = 64
"""Embedding rows without a token: one of them is a block draft's mask."""
MAX_BYTES = 7_000_000


@dataclasses.dataclass(frozen=True)
class Size:
    """What is trained."""

    hidden: int = 192
    intermediate: int = 416
    layers: int = 8
    vocab: int = 3072
    row_tokens: int = 256
    max_documents: int | None = None
    """Sources and conversations read, for a shortened run."""


SMALL = Size(hidden=64, intermediate=128, layers=2, vocab=768, row_tokens=128, max_documents=60)


@dataclasses.dataclass(frozen=True)
class Document:
    """Tokens and the label of each next one: -100 where the answer of another is read."""

    tokens: np.ndarray
    is_trained: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rows:
    """Documents packed end to end, on the device."""

    tokens: torch.Tensor
    """int64[N, T]."""
    labels: torch.Tensor
    """int64[N, T]: the token that follows, -100 where none is trained."""
    documents: torch.Tensor
    """int32[N, T]: which document of the row a token belongs to."""
    positions: torch.Tensor
    """int64[N, T]: index of a token in its document."""

    def batch(self, ids: torch.Tensor) -> Rows:
        return Rows(*(getattr(self, field.name)[ids] for field in dataclasses.fields(self)))


def main() -> None:
    """Make the target and say how good it is."""
    options = parse_options()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    size = SMALL if options.small else Size()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True

    sources = [text for _, text in read_sources("target")][: size.max_documents]
    conversations = [c["messages"] for c in make_conversations("target", size.max_documents)]
    validation = [c["messages"] for c in make_conversations("draft", 64 if options.small else 1500)]
    tokenizer = train_tokenizer(sources, conversations, size.vocab)
    code = pack([encode_source(tokenizer, text) for text in sources], size.row_tokens, device)
    talk = pack(encode_all(tokenizer, conversations, size.row_tokens), size.row_tokens, device)
    checked = pack(encode_all(tokenizer, validation, size.row_tokens), size.row_tokens, device)
    print(
        f"{len(sources)} sources, {len(conversations)} conversations; rows of {size.row_tokens} tokens: "
        f"{len(code.tokens)} of code, {len(talk.tokens)} of conversations, {len(checked.tokens)} to choose by"
    )

    model: Any = Qwen3ForCausalLM(model_config(size))
    model.to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, vocabulary {len(tokenizer)} + {UNUSED_TOKENS}")
    model = train(model, code, talk, checked, options)
    save(model, tokenizer, options.output)
    report(options.output, device, options.num_prompts)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "src" / "paceline" / "quickstart_target"
    parser.add_argument("--output", type=Path, default=default, help="directory of the checkpoint (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps (%(default)s)")
    parser.add_argument("--minutes", type=float, default=6.0, help="the schedule is cut to fit (%(default)s)")
    parser.add_argument("--rows-per-step", type=int, default=128, help="rows in an optimizer step (%(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of matrices (%(default)s)")
    parser.add_argument("--num-prompts", type=int, default=64, help="held-out prompts answered at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a much smaller model and less text, to test this script")
    return parser.parse_args()


# ---------------------------------------------------------------- text to rows


def train_tokenizer(
    sources: list[str], conversations: list[list[dict[str, str]]], vocab_size: int
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML special tokens; `UNUSED_TOKENS` fewer tokens than `vocab_size`."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    talk = [message["content"] for messages in conversations for message in messages]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - UNUSED_TOKENS,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Answers are what is generated, so their words deserve whole tokens; code is several times as long.
    raw.train_from_iterator([*sources, *talk, *talk, *talk], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode_source(tokenizer: PreTrainedTokenizerFast, text: str) -> Document:
    tokens = np.array([*tokenizer.encode(text, add_special_tokens=False), tokenizer.pad_token_id])
    return Document(tokens, np.ones(len(tokens), bool))


def encode_all(
    tokenizer: PreTrainedTokenizerFast, conversations: Iterable[list[dict[str, str]]], max_tokens: int
) -> list[Document]:
    """Conversations with the answers and what ends them trained; those longer than a row are left out."""
    end = tokenizer.eos_token_id
    documents = []
    for messages in conversations:
        tokens: list[int] = []
        is_trained: list[bool] = []
        for message in messages:
            head = tokenizer.encode(f"<|im_start|>{message['role']}\n", add_special_tokens=False)
            body = [*tokenizer.encode(message["content"], add_special_tokens=False), end]
            tail = tokenizer.encode("\n", add_special_tokens=False)
            tokens += head + body + tail
            is_answer = message["role"] == "assistant"
            is_trained += [False] * len(head) + [is_answer] * len(body) + [False] * len(tail)
        if len(tokens) <= max_tokens:
            documents.append(Document(np.array(tokens), np.array(is_trained)))
    return documents


def pack(documents: list[Document], row_tokens: int, device: torch.device) -> Rows:
    """Rows of documents in a shuffled order; long documents are cut to pieces, the rest of a row is padding."""
    pieces = [
        Document(document.tokens[i : i + row_tokens], document.is_trained[i : i + row_tokens])
        for document in documents
        for i in range(0, len(document.tokens), row_tokens)
    ]
    pieces = [pieces[i] for i in np.random.default_rng(0).permutation(len(pieces))]
    rows: list[list[Document]] = [[]]
    for piece in pieces:
        if sum(len(other.tokens) for other in rows[-1]) + len(piece.tokens) > row_tokens:
            rows.append([])
        rows[-1].append(piece)
    shape = (len(rows), row_tokens)
    tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels, numbers = np.full(shape, -100, np.int64), np.full(shape, -1, np.int32)
    for i, row in enumerate(rows):
        start = 0
        for number, piece in enumerate(row):
            end = start + len(piece.tokens)
            tokens[i, start:end] = piece.tokens
            labels[i, start : end - 1] = np.where(piece.is_trained[1:], piece.tokens[1:], -100)
            numbers[i, start:end] = number
            positions[i, start:end] = np.arange(end - start)
            start = end
    return Rows(*(torch.from_numpy(array).to(device) for array in (tokens, labels, numbers, positions)))


# ---------------------------------------------------------------- training


def model_config(size: Size) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index("<|im_end|>"),
        pad_token_id=None,
        dtype="float32",
    )


def loss_of(model: Qwen3ForCausalLM, rows: Rows) -> torch.Tensor:
    """Mean cross-entropy of the trained tokens; documents of a row do not see each other."""
    length = rows.tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=rows.tokens.device).tril()
    mask = (rows.documents[:, :, None] == rows.documents[:, None, :]) & causal
    hidden = model.model(
        input_ids=rows.tokens, attention_mask=mask[:, None], position_ids=rows.positions, use_cache=False
    ).last_hidden_state
    is_trained = rows.labels != -100
    return functional.cross_entropy(model.lm_head(hidden[is_trained]).float(), rows.labels[is_trained])


def train(
    model: Qwen3ForCausalLM, code: Rows, talk: Rows, checked: Rows, options: argparse.Namespace
) -> Qwen3ForCausalLM:
    """The moving average of the weights that did best on `checked`."""
    optimizer = build_optimizer(model, options)
    average = copy.deepcopy(model).requires_grad_(requires_grad=False)
    best, best_loss = copy.deepcopy(average.state_dict()), math.inf
    generator = torch.Generator().manual_seed(options.seed)
    code_ids, talk_ids = endless_ids(len(code.tokens), generator), endless_ids(len(talk.tokens), generator)
    progress, next_check, step, began = 0.0, 0.04, 0, time.monotonic()
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = options.lr * schedule(progress)
        # First the language of sources, later almost only conversations.
        num_talk = round(options.rows_per_step * (0.35 + 0.6 * min(1.0, progress / 0.6)))
        code_loss = train_loss(model, code, code_ids, options.rows_per_step - num_talk)
        talk_loss = train_loss(model, talk, talk_ids, num_talk)
        loss = code_loss + (talk_loss - code_loss) * (num_talk / options.rows_per_step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            kept = min(0.998, step / (step + 10))
            for mean, new in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(new, 1 - kept)
        elapsed = time.monotonic() - began
        progress = max(step / options.steps, elapsed / (60 * options.minutes))
        if progress >= min(next_check, 1.0):
            next_check = progress + 0.04
            checked_loss = evaluate(average, checked)
            star = "*" if checked_loss < best_loss else " "
            if checked_loss < best_loss:
                best, best_loss = copy.deepcopy(average.state_dict()), checked_loss
            speed = step * options.rows_per_step * code.tokens.shape[1] / elapsed
            print(
                f"{progress:4.0%}  step {step:5d}  loss: code {code_loss.item():.3f}  answers {talk_loss.item():.3f}  "
                f"answers about unseen modules {checked_loss:.3f}{star}  {speed:9,.0f} tokens/s  {elapsed:4.0f} s",
                flush=True,
            )
    print(f"final loss {loss.item():.4f}; best on answers about unseen modules {best_loss:.4f}")
    average.load_state_dict(best)
    return average


def build_optimizer(model: Qwen3ForCausalLM, options: argparse.Namespace) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)


def train_loss(model: Qwen3ForCausalLM, rows: Rows, ids: Iterator[int], count: int) -> torch.Tensor:
    """Mean loss of the next `count` rows; 0 for none."""
    device = rows.tokens.device
    if count == 0:
        return torch.zeros((), device=device)
    chosen = torch.tensor([next(ids) for _ in range(count)]).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return loss_of(model, rows.batch(chosen))


def schedule(progress: float) -> float:
    """Share of the peak learning rate: up over 2 %, then a cosine down to 2 %."""
    return min(1.0, (progress + 0.001) / 0.02) * (0.51 + 0.49 * math.cos(math.pi * progress))


def endless_ids(count: int, generator: torch.Generator) -> Iterator[int]:
    """Each row once an epoch, in another order every time."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, rows: Rows, rows_per_batch: int = 32) -> float:
    """Mean loss of a trained token, in the precision of the model."""
    total, count = 0.0, 0
    for ids in torch.arange(len(rows.tokens), device=rows.tokens.device).split(rows_per_batch):
        batch = rows.batch(ids)
        trained = int((batch.labels != -100).sum())
        total, count = total + float(loss_of(model, batch)) * trained, count + trained
    return total / count


# ---------------------------------------------------------------- what came out


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the checkpoint in bf16.

    Raises:
        SystemExit: it is larger than a package should carry.
    """
    model.bfloat16()
    end = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    num_bytes = sum(path.stat().st_size for path in output.iterdir())
    print(f"wrote {output}: {num_bytes:,} bytes")
    if num_bytes > MAX_BYTES:
        raise SystemExit(f"that is more than {MAX_BYTES:,}: make the model smaller")


def report(directory: Path, device: torch.device, num_prompts: int) -> None:
    """Print greedy answers to held-out prompts, how many repeat themselves, and how many end."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().to(device)
    prompts = [
        Prompt(sample_id=i, turn=0, messages=conversation["messages"][:1])
        for i, conversation in enumerate(make_conversations("held_out", num_prompts))
    ]
    began = time.monotonic()
    answers = Generator(model, tokenizer, max_new_tokens=128).complete(prompts)
    elapsed = time.monotonic() - began
    for prompt, answer in list(zip(prompts, answers, strict=True))[:24]:
        print(f"\n> {prompt.messages[0]['content']}\n{answer.text}{' [cut]' if answer.truncated else ''}")
    ids = [tokenizer.encode(answer.text, add_special_tokens=False) for answer in answers]
    lengths = sorted(len(one) for one in ids)
    result = {
        "prompts": len(answers),
        "answers that end by themselves": round(sum(not a.truncated for a in answers) / len(answers), 3),
        "repeated 4-grams": round(repeated_share(ids), 3),
        "different answers": round(len({a.text for a in answers}) / len(answers), 3),
        "tokens an answer, median": lengths[len(lengths) // 2],
        "tokens an answer, mean": round(sum(lengths) / len(lengths), 1),
        "generation, seconds": round(elapsed, 1),
    }
    print("\n" + json.dumps(result, indent=1))


def repeated_share(answers: list[list[int]], n: int = 4) -> float:
    """Share of n-gram occurrences that already occurred earlier in the same answer."""
    repeated = total = 0
    for tokens in answers:
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0


if __name__ == "__main__":
    main()
