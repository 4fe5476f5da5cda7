"""Trains the embedded model, writes its Hugging Face folder and says how many held-out sums it gets right."""

import argparse
import time
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tokenweave.embedded import path
from tokenweave.embedded.data import batches, labels_of
from tokenweave.embedded.score import report
from tokenweave.embedded.tokenizer import BOS, EOS, PAD, VOCABULARY, build_tokenizer


@dataclass(frozen=True)
class Recipe:
    """How to train. Learning rates are peaks, reached after `warmup` steps; from there they fall linearly to zero."""

    steps: int = 1000
    batch: int = 256
    warmup: int = 100
    matrix_lr: float = 4e-3
    other_lr: float = 3e-3
    seed: int = 0
    threads: int = 1  # part of the recipe: another number sums in another order, and gives slightly different weights


def model_config() -> LlamaConfig:
    """Eight query heads and four KV heads, so that up to eight ranks can share it."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.05,
        pad_token_id=VOCABULARY[PAD],
        bos_token_id=VOCABULARY[BOS],
        eos_token_id=VOCABULARY[EOS],
        tie_word_embeddings=False,
    )


def optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (it needs far fewer steps here), AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def rate(step: int, recipe: Recipe) -> float:
    """The share of the peak learning rate at this step."""
    return min((step + 1) / recipe.warmup, (recipe.steps - step) / (recipe.steps - recipe.warmup))


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), labels_of(ids).flatten())


def step(model: LlamaForCausalLM, ids: torch.Tensor, parts: list) -> float:
    """One update by every optimizer and schedule in `parts`; the loss before it."""
    loss = loss_of(model, ids)
    loss.backward()
    for part in parts:
        part.step()
    model.zero_grad()
    return loss.item()


def train(recipe: Recipe) -> LlamaForCausalLM:
    """A model trained from scratch in fp32; the same recipe gives the same model."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    model = LlamaForCausalLM(model_config())
    chosen = optimizers(model, recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda now: rate(now, recipe)) for o in chosen]
    bar = tqdm(islice(batches(recipe.batch, recipe.seed), recipe.steps), total=recipe.steps, unit="step")
    for ids in bar:
        bar.set_postfix(loss=f"{step(model, ids, [*chosen, *schedules]):.4f}", refresh=False)
    return model


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Writes config, generation config, bf16 weights and tokenizer."""
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.bfloat16().save_pretrained(out)
    build_tokenizer().save_pretrained(out, save_jinja_files=False)


def parse_recipe() -> tuple[Recipe, Path]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=path(), help="folder to write")
    for field in fields(Recipe):
        name, kind = field.name.replace("_", "-"), type(field.default)
        parser.add_argument(f"--{name}", type=kind, default=field.default, metavar=kind.__name__, help="see Recipe")
    options = vars(parser.parse_args())
    out = options.pop("out")
    return Recipe(**options), out


def main() -> None:
    recipe, out = parse_recipe()
    started = time.monotonic()
    save(train(recipe), out)
    print(f"{recipe}: {(time.monotonic() - started) / 60:.1f} minutes")
    print(report(out))


if __name__ == "__main__":
    main()
