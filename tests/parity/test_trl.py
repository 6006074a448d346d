"""Parity with the installed TRL: the losses of its DPO and reward trainers on the same model and pairs."""

import copy

import datasets
import pytest
import torch

from bfpo.config.recipes import Source, TextSection
from bfpo.data.load import SourceReport
from bfpo.data.table import pair_table, score_table
from bfpo.data.tokenize import Encoder
from bfpo.judging.score_texts import encode_scored
from bfpo.losses.baselines import DPO, IPOAvg
from bfpo.losses.inputs import PairLogps
from bfpo.losses.scores import reward_loss
from bfpo.model.layout import packed_layout, padded_layout
from bfpo.model.logps import add_layout_forward, completion_logps
from bfpo.model.score_heads import add_score_heads, completion_scores, padding_id


@pytest.fixture
def trl_trainer(tokenizer, main_pairs, tmp_path):
    """Return a function that makes TRL's trainer on the toy pairs, and its tokenizer."""
    trl = pytest.importorskip("trl")
    # TRL scores what a template adds after the end of the turn, bfpo doesn't. Here nothing is added.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    rows = [
        {
            "prompt": [message.to_row() for message in pair.prompt],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in main_pairs
    ]

    def make(policy, reference, loss_type="sigmoid"):
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
        return trainer, next(iter(trainer.get_train_dataloader()))

    return make, tokenizer


def encode(tokenizer, pairs):
    encoded, examples = Encoder(tokenizer, TextSection()).encode(pairs, SourceReport("toy", Source(path="-")))
    return pair_table(examples, encoded)


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("layout", [packed_layout, padded_layout])
def test_logps_equal_those_of_trl(layout, trl_trainer, make_model, main_pairs):
    from trl.trainer.utils import selective_log_softmax

    make, tokenizer = trl_trainer
    model = make_model(seed=1)
    trainer, inputs = make(model, model)
    table = encode(tokenizer, main_pairs)

    def sorted_logps(model):
        with torch.no_grad():
            logps = completion_logps(model, layout([table[row] for row in range(len(table))]))
        # Sorted, because TRL shuffles its rows.
        return logps[0::2].sort().values, logps[1::2].sort().values

    expected = trainer.compute_ref_log_probs(trainer.model, inputs)
    for logps, trl_logps in zip(sorted_logps(model), expected, strict=True):
        torch.testing.assert_close(logps, trl_logps.double().sort().values, rtol=1e-6, atol=1e-5)
    # TRL's head rounds to float32. In float64: TRL's batch, mask and function on the model's own logits.
    model.double()
    with torch.no_grad():
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    tokens = selective_log_softmax(logits, inputs["input_ids"][:, 1:])
    expected = (tokens * inputs["completion_mask"][:, 1:]).sum(1).chunk(2)
    for logps, trl_logps in zip(sorted_logps(model), expected, strict=True):
        torch.testing.assert_close(logps, trl_logps.sort().values, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize(("loss_type", "loss"), [("sigmoid", DPO(beta=0.1)), ("ipo", IPOAvg(beta=0.1))])
def test_loss_equals_that_of_trl(loss_type, loss, trl_trainer, make_model, main_pairs):
    make, tokenizer = trl_trainer
    policy, reference = make_model(seed=1), make_model(seed=2)
    trainer, inputs = make(policy, reference, loss_type)
    with torch.no_grad():
        trl_loss = trainer.compute_loss(trainer.model, inputs).item()
    table = encode(tokenizer, main_pairs)
    layout = packed_layout([table[row] for row in range(len(table))])
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
    assert pairs.margin.abs().min() > 0.1  # at zero margins any two losses could agree
    # float32 forward passes in two layouts; TRL sums in float32
    assert loss(pairs).mean().item() == pytest.approx(trl_loss, rel=2e-5)


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_reward_loss_equals_that_of_trl(coefficient, tokenizer, make_model, main_pairs, tmp_path):
    trl = pytest.importorskip("trl")
    scorer = add_score_heads(make_model(), 1, pad_id=padding_id(tokenizer), seed=1)
    torch.nn.init.normal_(scorer.score.weight, generator=torch.Generator().manual_seed(0))
    rows = [
        {
            "prompt": [message.to_row() for message in pair.prompt],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in main_pairs
    ]
    trainer = trl.RewardTrainer(
        model=copy.deepcopy(scorer),
        args=trl.RewardConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=len(rows),
            center_rewards_coefficient=coefficient,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=True,
            max_length=None,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
    )
    # TRL needs the mean over a batch of its own order, which has all pairs.
    trl_loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).item()
    kept, examples = encode_scored(main_pairs, tokenizer, SourceReport("toy", Source(path="-")), max_length=512)
    table = score_table(examples, kept)
    add_layout_forward(scorer, completion_scores)
    with torch.no_grad():
        rewards = scorer(layout=packed_layout([*table])).unflatten(0, (-1, 2))[..., 0]
    loss = reward_loss(rewards[:, 0], rewards[:, 1], center_rewards_coefficient=coefficient).mean().item()
    assert loss == pytest.approx(trl_loss, rel=2e-5)
    assert rewards.std() > 0.1
