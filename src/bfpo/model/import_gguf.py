"""The work of `bfpo model import`: a GGUF file as an ordinary checkpoint."""

from pathlib import Path

from transformers import PreTrainedModel

from bfpo.config.recipes import ModelSection, is_gguf
from bfpo.core.terminal import say
from bfpo.errors import ModelError, RecipeError
from bfpo.model.gguf import gguf_metadata
from bfpo.model.load import load_model, load_tokenizer
from bfpo.model.merge import DTYPES
from bfpo.model.save import check_out, save_checkpoint

# Name, hash and types of the file that a checkpoint was made of.
RECORD = "imported.json"


def import_gguf(path: str, out: Path, *, dtype: str = "float32") -> None:
    """Save the model in a GGUF file as safetensors, with configuration, tokenizer and chat template.

    It is saved under a temporary name and renamed, so that `out` is never incomplete.

    Args:
        path: GGUF file, or `org/name/file.gguf` on the hub.
        out: Output folder; must be empty or not exist yet.
        dtype: Type of the saved weights, one of `DTYPES`.

    Raises:
        RecipeError: If `dtype` isn't one of `DTYPES`.
        ModelError: If the file can't be read, or `out` isn't empty.
        MissingExtra: If the package `gguf` isn't installed.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"dtype is '{dtype}'; expected one of {', '.join(DTYPES)}")
    if not is_gguf(path):
        raise ModelError(f"'{path}' is not a GGUF file; expected a name that ends in .gguf")
    check_out(out)
    section = ModelSection.model_validate({"path": path, "dtype": dtype})
    tokenizer, model = load_tokenizer(section), load_model(section)
    assert isinstance(model, PreTrainedModel)
    save_checkpoint(model, tokenizer, out, {RECORD: gguf_metadata(path)["gguf"]})
    template = "a chat template" if tokenizer.chat_template else "no chat template (probably a base model)"
    say(f"imported into {out}: {type(model).__name__}, {model.num_parameters():,} parameters, {dtype}, {template}")
