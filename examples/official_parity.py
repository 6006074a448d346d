"""Train the same tiny model by the official code's arithmetic and by BFPOTrainer, and compare the losses.

    python examples/official_parity.py                    # with a copy of the official formula, see below
    python examples/official_parity.py --official PATH    # with the function of a checkout of wx-zhang/bfpo

Two streams, ten steps of two micro-batches, AdamW, cosine schedule with warm-up, clipping, like the official run. The
official side is a plain loop: a policy, a frozen copy as reference, one row for each answer, and

* per micro-batch mean loss of the main pairs plus mean loss of the buffer pairs, one backward pass of the sum
  (src/alignment/trainer/trainer.py, `training_step`), divided by the number of micro-batches by accelerate;
* log-probabilities summed over the answer's tokens (TRL 0.7.7's DPOTrainer, copied in src/alignment/trainer/dpo.py).

Both sides get the same rows in the order of our plan, because the official code shuffles differently. In float64, so
that only rounding differs.
"""

import argparse
import ast
import copy
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainingArguments, get_cosine_schedule_with_warmup

from bfpo import BFPOTrainer
from bfpo.config.recipes import NewModel
from bfpo.losses import BFPO
from bfpo.model.new import new_model, new_tokenizer

BETA, B1, ALPHA = 0.1, 3.0, 0.5
STEPS, PER_DEVICE, ACCUMULATION, WARMUP = 10, 2, 2, 1
LEARNING_RATE = 1e-3
# transformers sums the logged losses and computes gradient norms in float32.
TOLERANCE = 1e-6

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def official_loss(
    safe_w: Tensor, safe_l: Tensor, policy_w: Tensor, policy_l: Tensor, ref_w: Tensor, ref_l: Tensor
) -> Tensor:
    """Return the official loss of each pair: src/alignment/trainer/bfpo.py @7f7d002, lines 30 and 125 to 137."""
    b3 = 1 / (B1 - 1)
    factor = B1 * b3 * safe_w - b3 * safe_l - ALPHA
    return ((policy_w - policy_l) - (ref_w - ref_l) - factor / BETA) ** 2


def checkout_loss(path: Path) -> Loss:
    """Return the loss of a checkout's `BFPOTrainer.bfpo`, extracted because the file's imports need old packages."""
    file = path / "src" / "alignment" / "trainer" / "bfpo.py"
    if not file.is_file():
        raise SystemExit(f"error: {file} doesn't exist; --official expects a checkout of wx-zhang/bfpo")
    methods = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
    method = next((node for node in methods if node.name == "bfpo"), None)
    if method is None:
        raise SystemExit(f"error: {file} has no method `bfpo`")
    # Its annotations use names that are not imported here.
    method.returns = None
    for argument in method.args.args:
        argument.annotation = None
    names: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module([method], []), str(file), "exec"), names)
    trainer = SimpleNamespace(beta=BETA, b1=B1, alpha=ALPHA, b3=1 / (B1 - 1))
    # It uses the labels as integer indices.
    return lambda safe_w, safe_l, *logps: names["bfpo"](trainer, safe_w.long(), safe_l.long(), *logps)[0]


def toy_pairs(count: int, first: int) -> list[dict[str, Any]]:
    """Return pairs with answers of several lengths, in all four cells."""
    words = ("red", "green", "blue", "box", "ball", "door", "near", "under", "behind")
    texts = [" ".join(permutation) for permutation in itertools.permutations(words, 4)]
    return [
        {
            "prompt": f"say {texts[7 * number]} {number}",
            "chosen": " ".join(texts[11 * number : 11 * number + 1 + number % 3]),
            "rejected": " ".join(texts[13 * number + 1 : 13 * number + 2 + number % 2]),
            "is_chosen_safe": number % 2 == 0,
            "is_rejected_safe": number % 4 < 2,
        }
        for number in range(first, first + count)
    ]


def answer_logps(model: Any, trainer: BFPOTrainer, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Return the summed log-probabilities of the chosen and the rejected answers, (n,) and (n,)."""
    sums: list[list[Tensor]] = [[], []]
    for row in rows:
        prompt, answers = trainer.table[row]
        for side, answer in enumerate(answers):
            ids = torch.tensor([*prompt, *answer])
            logps = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            sums[side].append(logps.gather(1, ids[1:, None])[len(prompt) - 1 :].sum())
    chosen, rejected = sums
    return torch.stack(chosen), torch.stack(rejected)


def official_run(model: Any, trainer: BFPOTrainer, loss: Loss) -> list[float]:
    """Train like the official code on the rows of the trainer's plan; return the loss of each step."""
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    safe = torch.stack([torch.from_numpy(bits) for bits in (trainer.table.chosen_safe, trainer.table.rejected_safe)])
    losses = []
    for step in range(STEPS):
        step_loss = 0.0
        for micro in range(ACCUMULATION):
            micro_batch = slice(micro * PER_DEVICE, (micro + 1) * PER_DEVICE)
            stream_losses = []
            for stream in trainer.plan.step(step):
                rows = stream[micro_batch].tolist()
                policy_logps = answer_logps(model, trainer, rows)
                with torch.no_grad():
                    reference_logps = answer_logps(reference, trainer, rows)
                losses_of_pairs = loss(safe[0, rows], safe[1, rows], *policy_logps, *reference_logps)
                stream_losses.append(losses_of_pairs.mean())
            micro_loss = sum(stream_losses) / ACCUMULATION
            micro_loss.backward()
            step_loss += float(micro_loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(step_loss)
    return losses


def main() -> None:
    """Train both ways and print the differences."""
    parser = argparse.ArgumentParser(description="Compare BFPOTrainer with the official arithmetic, step by step.")
    parser.add_argument("--official", type=Path, help="checkout of wx-zhang/bfpo, to use its function")
    checkout = parser.parse_args().official
    loss = official_loss if checkout is None else checkout_loss(checkout)
    torch.set_num_threads(1)
    main_pairs, buffer_pairs = toy_pairs(20, 0), toy_pairs(14, 20)
    tokenizer = new_tokenizer([text for pair in main_pairs for text in (pair["prompt"], pair["chosen"])], 300)
    model = new_model(NewModel(shape="nano", vocab_size=300), tokenizer).double()
    untrained = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=PER_DEVICE, learning_rate=LEARNING_RATE,
            gradient_accumulation_steps=ACCUMULATION, lr_scheduler_type="cosine", warmup_steps=WARMUP,
            max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = BFPOTrainer(
            model, args, main_pairs, buffer_dataset=buffer_pairs, processing_class=tokenizer,
            loss=BFPO(beta=BETA, b1=B1, alpha=ALPHA), reference="shared",
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        official = official_run(untrained, trainer, loss)
        trainer.train()
    ours = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"{'step':>4}  {'BFPOTrainer':>14}  {'official':>14}  {'difference':>10}")
    for step, (our_loss, their_loss) in enumerate(zip(ours, official, strict=True)):
        print(f"{step:>4}  {our_loss:>14.8f}  {their_loss:>14.8f}  {abs(our_loss - their_loss):>10.1e}")
    largest = max(
        abs(our_loss - their_loss) / their_loss for our_loss, their_loss in zip(ours, official, strict=True)
    )
    print(f"largest relative difference of a loss: {largest:.1e} (tolerance {TOLERANCE:.0e})")
    weights = zip(model.parameters(), untrained.parameters(), strict=True)
    weight_difference = max((a - b).detach().abs().max().item() for a, b in weights)
    print(f"largest difference of a weight: {weight_difference:.1e}")
    raise SystemExit(largest > TOLERANCE)


if __name__ == "__main__":
    main()
