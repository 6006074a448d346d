"""Parity with the installed TRL: its DPO trainer's loss on the same model, reference and pairs."""

import copy

import datasets
import pytest
import torch

from bfpo.data.load import SourceReport
from bfpo.data.table import pair_table
from bfpo.data.tokenise import Encoder
from bfpo.losses import DPO, IPOAvg, PairLogps
from bfpo.model.layout import padded_layout
from bfpo.model.logps import completion_logps
from bfpo.recipe import Source, TextSection


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize(("loss_type", "loss"), [("sigmoid", DPO(beta=0.1)), ("ipo", IPOAvg(beta=0.1))])
def test_loss_equals_that_of_trl(loss_type, loss, tokenizer, make_model, main_pairs, tmp_path):
    trl = pytest.importorskip("trl")
    # TRL scores what a template puts behind the end of the turn; we don't. Here is nothing behind it.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    policy, reference = make_model(seed=1), make_model(seed=2)
    rows = [
        {
            "prompt": [m._asdict() for m in pair.prompt],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in main_pairs
    ]
    config = trl.DPOConfig(
        output_dir=str(tmp_path),
        loss_type=loss_type,
        beta=0.1,
        per_device_train_batch_size=len(rows),
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=True,
        max_length=None,
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(reference),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, inputs).item()

    kept, examples = Encoder(tokenizer, TextSection()).encode(main_pairs, SourceReport("toy", Source(path="-")))
    table = pair_table(examples, kept)
    layout = padded_layout([table[row] for row in range(len(table))])
    with torch.no_grad():
        logps, ref = completion_logps(policy, layout), completion_logps(reference, layout)
    lengths = torch.tensor(layout.lengths, dtype=torch.float64)
    pairs = PairLogps(
        logps[0::2],
        logps[1::2],
        ref[0::2],
        ref[1::2],
        chosen_safe=torch.from_numpy(table.chosen_safe),
        rejected_safe=torch.from_numpy(table.rejected_safe),
        chosen_lengths=lengths[0::2],
        rejected_lengths=lengths[1::2],
    )
    assert pairs.margin.abs().min() > 0.1  # a comparison at zero margins would show nothing
    # float32 forward passes in two layouts; TRL sums in float32
    assert loss(pairs).mean().item() == pytest.approx(theirs, rel=2e-5)
