"""What a first recipe is decided by: goals that the data allow, what fits, beta, learning rates."""

import pytest

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import ModelSection, TrainRecipe
from bfpo.errors import RecipeError
from bfpo.training.first_choices import (
    GOALS,
    PACK,
    DataFacts,
    Machine,
    ModelFacts,
    TrainedChoice,
    check_goal,
    choose_beta,
    choose_rate,
    choose_trained,
    possible_choices,
    possible_goals,
)
from bfpo.training.starter import write_starter

LABELED = DataFacts([{"path": "pairs.jsonl"}], cells={"ss": 2000, "us": 1000}, span=300, longest=500, answer=150)
UNLABELED = DataFacts([{"path": "pairs.jsonl"}], cells={"unlabeled": 50}, span=300, longest=500, answer=30)
PROMPTS = DataFacts([{"path": "prompts.jsonl"}], has_pairs=False)
CPU, GPU = Machine(False, 16e9, "free"), Machine(True, 24e9, "free")
DOWN = TrainedChoice("down_proj", 1e9, PACK, False)
LORA = TrainedChoice("lora", 1e9, 3000, True)


def model(parameters=7e9, max_positions=2048):
    return ModelFacts("org/model", int(parameters), "llama", True, max_positions, True)


def test_the_data_decide_which_goals_there_are():
    assert possible_goals(LABELED) == ["safer", "at-most", "sft-first"]
    assert possible_goals(UNLABELED) == ["label-first"]
    assert possible_goals(PROMPTS) == ["redteam"]
    for facts, goal, reason in (
        (UNLABELED, "safer", "50 of 50 pairs have no safety labels; choose label-first"),
        (PROMPTS, "at-most", "prompts without answers; choose redteam"),
        (LABELED, "label-first", "pairs with safety labels; choose safer or at-most or sft-first"),
    ):
        with pytest.raises(RecipeError, match=reason):
            check_goal(goal, facts)


@pytest.mark.parametrize(
    ("answer", "beta"), [(300, 0.01), (100, 0.01), (99, 0.05), (10, 0.05), (9, 0.1), (4, 0.2), (1, 0.5), (0, 0.5)]
)
def test_targets_are_within_reach_of_a_typical_answer(answer, beta):
    chosen, _ = choose_beta(answer)
    assert chosen == beta
    # 2 nats a token; with the largest beta there is nothing else to choose.
    assert 1 / chosen <= 2 * answer or chosen == 0.5


def test_the_learning_rate_has_its_source():
    assert choose_rate(model(7e9), DOWN) == (5e-7, "the paper's, for 7 B")
    assert choose_rate(model(8e9), LORA)[0] == 5e-6
    assert choose_rate(model(1.4e8), DOWN)[0] == 1e-4
    rate, reason = choose_rate(model(1.1e9), DOWN)
    assert rate == 5e-7
    assert "no run of ours has this size" in reason


def saved(folder, make_model, tokenizer):
    make_model(shape="small").config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelSection(path=str(folder))


def test_less_memory_means_smaller_packs_then_recomputing(tmp_path, make_model, tokenizer):
    section = saved(tmp_path, make_model, tokenizer)

    def choose(memory):
        machine = Machine(False, memory, "free")
        return choose_trained(possible_choices(section, tokenizer, machine, longest=1000), machine)

    roomy = choose(8e9)
    assert (roomy.name, roomy.checkpointing, roomy.max_tokens) == ("down_proj", False, PACK)
    # What each way takes with the longest pair alone; a fifth of the memory is left.
    ways = possible_choices(section, tokenizer, Machine(False, 1e6, "free"), longest=1000)
    plain, recomputing, *_ = (way.total / 0.8 for way in ways)
    tight = choose(1.01 * plain)
    assert (tight.name, tight.checkpointing) == ("down_proj", False)
    assert 1000 <= tight.max_tokens < PACK
    assert choose(0.99 * plain).checkpointing
    smallest = min(way.total / 0.8 for way in ways)
    assert smallest <= recomputing
    with pytest.raises(RecipeError, match=r"training takes about 0\.\d GiB \(\w+\), which is more than 80% of 0\.\d"):
        choose(0.99 * smallest)


def test_an_adapter_is_chosen_where_nothing_better_fits():
    ways = [DOWN._replace(max_tokens=0), LORA, LORA._replace(name="qlora")]
    assert choose_trained(ways, GPU) == LORA


def test_4_bit_weights_are_for_gpus(tmp_path, make_model, tokenizer):
    section = saved(tmp_path, make_model, tokenizer)
    names = {
        machine.is_gpu: [choice.name for choice in possible_choices(section, tokenizer, machine, longest=100)]
        for machine in (CPU, GPU)
    }
    assert "qlora" in names[True]
    assert "qlora" not in names[False]


@pytest.mark.parametrize("goal", [goal for goal in GOALS if goal != "redteam"])
@pytest.mark.parametrize(("machine", "choice"), [(CPU, DOWN), (GPU, LORA)])
def test_a_recipe_is_valid_and_every_key_has_a_reason(goal, machine, choice):
    facts = UNLABELED if goal == "label-first" else LABELED
    starter = write_starter(goal, facts, model(), machine, choice, "recipe.yaml")
    recipe = check_recipe(starter.content, TrainRecipe, "starter")
    assert all(starter.reasons[key] for key in starter.content)
    assert recipe.text.max_length == 512
    trainer = recipe.trainer
    batch = trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"]
    assert batch == (8 if goal == "label-first" else 32)
    assert trainer.get("bf16", False) == machine.is_gpu
    assert (recipe.train_only is None) == (choice is LORA)
    # An adapter that was fine-tuned is trained further: there is no second one.
    assert (recipe.lora is None) == (choice is DOWN or goal == "sft-first")
    if goal == "at-most":
        assert (
            "bfpo dual scored.jsonl --max 0.02 --kind harmful --recipe recipe.yaml --out dual" in starter.next_steps
        )


@pytest.mark.parametrize("choice", [LORA, LORA._replace(name="qlora")])
def test_a_fine_tuned_model_is_loaded_as_it_was_fine_tuned(choice):
    content = write_starter("sft-first", LABELED, model(), GPU, choice, "recipe.yaml").content
    recipe = check_recipe(content, TrainRecipe, "starter")
    for section in (recipe.model, recipe.model.sft.model):
        assert (section.dtype, section.load_in_4bit) == ("bfloat16", choice.name == "qlora")


def test_what_the_data_lack_is_said():
    only_safe = DataFacts([{"path": "a"}], cells={"ss": 10}, span=9, longest=9, answer=5)
    only_unsafe = DataFacts([{"path": "a"}], cells={"us": 10}, span=9, longest=9, answer=5)
    notes = [write_starter("safer", facts, model(), CPU, DOWN, "r").warnings for facts in (only_safe, only_unsafe)]
    assert any("nothing here teaches safety" in warning for warning in notes[0])
    assert any("by refusing everything" in warning for warning in notes[1])
    buffered = DataFacts([{"path": "a"}], [{"path": "b"}], cells={"us": 10}, buffer_pairs=5, unlabeled_buffer=5)
    starter = write_starter("safer", buffered, model(), CPU, DOWN, "r")
    assert starter.content["buffer"] == [{"path": "b", "assume_safe": True}]
    assert len(starter.warnings) == 1
    assert starter.warnings[0].startswith("10 pairs are too few to hold some out: nothing is evaluated")


def test_a_share_of_faults_that_would_stop_the_run_is_allowed_and_named():
    facts = DataFacts([{"path": "a"}], cells={"us": 10}, dropped=0.3)
    starter = write_starter("safer", facts, model(), CPU, DOWN, "r")
    assert starter.content["max_dropped"] == 0.35
    assert "30%" in starter.reasons["max_dropped"][0]
