"""The public files that the example reads: where each is published, and the SHA-256 of its content."""

import hashlib
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bfpo.core.files import file_hash, open_atomic
from bfpo.core.terminal import say
from bfpo.errors import DataError

GITHUB = "https://raw.githubusercontent.com"
NON_COMMERCIAL = "CC-BY-NC-4.0"
TIMEOUT = 60


@dataclass(frozen=True)
class Source:
    """A published file.

    Args:
        name: Path of the file in a folder of data.
        url: Where it is published, below `GITHUB`: owner, name, commit and path.
        sha256: SHA-256 of its content.
        license: License of the data.
        instead: Pattern of a file with the same rows in another form, which a folder of data may have instead.
    """

    name: str
    url: str
    sha256: str
    license: str
    instead: str | None = None


def _xstest(model: str, sha256: str) -> Source:
    completions = "paul-rottger/xstest/d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d/model_completions"
    url = f"{completions}/xstest_v2_completions_{model}.csv"
    return Source(f"xstest/completions_{model}.csv", url, sha256, "CC-BY-4.0 (prompts)")


def _alpaca_eval(model: str, sha256: str) -> Source:
    results = "tatsu-lab/alpaca_eval/cd543a149df89434d8a54582c0151c0b945c3d20/results"
    url = f"{results}/{model}/weighted_alpaca_eval_gpt4_turbo/annotations.json"
    return Source(f"alpaca_eval/{model}.json", url, sha256, NON_COMMERCIAL, f"alpaca_eval/{model}.jsonl.gz")


def _gptfuzz(name: str, path: str, sha256: str) -> Source:
    url = f"sherdencooper/GPTFuzz/1eddeb565740ae311b5f4950492b011a6f866fe7/datasets/{path}"
    return Source(f"gptfuzz/{name}", url, sha256, "MIT", "gptfuzz*/train.jsonl.gz")


XSTEST = (
    _xstest("gpt4", "71af323af8ecdec0efae23992317721441d2cfedddedeef3248f842f4e15c9ca"),
    _xstest("llama2new", "6365cc55ce0a593c7ab8785853d02784be027d97199d4077912b4313cd010099"),
    _xstest("llama2orig", "cbc52550e8ba8197a3e3d97a5af078d27bae4766737cd62df80270126a87ffc6"),
    _xstest("mistralguard", "0ac03817b65e019a8f5b4b3eed805086f9f7fafe538ac9ebd156f80210af6903"),
    _xstest("mistralinstruct", "6a146b65a5b96ec8249729bc2db459697175125998d7cbbcc88f7688ecf31dad"),
)
ALPACA_EVAL = (
    _alpaca_eval("OpenHermes-2.5-Mistral-7B", "196f38b5f7fb3c3242635cc4a8175f2c7b39d5648979f086ec7ba93c99e190ff"),
    _alpaca_eval("claude-instant-1.2", "d1e37abd139b989524f2474129eaffc5ca18b050c1a6d9a874a7f1683ee5a50b"),
    _alpaca_eval("gemma-7b-it", "bd5de7f969f6783933d7cf2cf6720d1ebcfdf0a164626fa5439abea521e27de3"),
    _alpaca_eval("vicuna-7b-v1.5", "95d713d4f6c7f9afecd3a1de089336aca2e99addb954ff48a653e0c65ccfa376"),
)
ADVBENCH = Source(
    "advbench/harmful_behaviors.csv",
    "andyrdt/refusal_direction/9d852fae1a9121c78b29142de733cb1340770cc3/dataset/raw/advbench.csv",
    "6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1",
    "MIT",
)
GPTFUZZ_QUESTIONS = _gptfuzz(
    "question_list.csv",
    "questions/question_list.csv",
    "18531eb6bc1c8fc0b8f66822b366b872202b852bf28826cef590ad0d7a81c749",
)
GPTFUZZ = _gptfuzz(
    "train.csv",
    "responses_labeled/train.csv",
    "ae25fe2a06d2085af260927164364524628c8b5c1dd1bab1b58ddbd917c3f7cb0",
)
PKU = Source(
    "pku_saferlhf/pku_seferlhf_realign_dpo_5k.json",
    "xinykou/safety_realignment/5a805935b6fbdd7d63cf013c622631a186c133a5"
    "/llama_factory/data/pku_seferlhf_realign_dpo_5k.json",
    "deafcb69fea91daa7a1d7b0f8785d0d567f41e8ea5109d49b8966207c2c34818",
    NON_COMMERCIAL,
    "pku_saferlhf/test_safe_unsafe_pairs.jsonl.gz",
)
SOURCES: Sequence[Source] = (*XSTEST, *ALPACA_EVAL, ADVBENCH, GPTFUZZ_QUESTIONS, GPTFUZZ, PKU)


class Files:
    """The files of all sources.

    Args:
        data: Folder that has them all; None downloads what is missing in `downloads`.
        downloads: Folder of downloaded files.

    Raises:
        DataError: If a file is missing in `data`, has another content, or can't be downloaded.
    """

    def __init__(self, data: Path | None, downloads: Path) -> None:
        self.paths = {
            source: _download(source, downloads / source.name) if data is None else _find(source, data)
            for source in SOURCES
        }

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of the file that each source is read from."""
        return {source.name: file_hash(path) for source, path in self.paths.items()}


def _find(source: Source, data: Path) -> Path:
    if (path := data / source.name).exists():
        return _checked(source, path)
    if source.instead and (paths := sorted(data.glob(source.instead))):
        return paths[0]
    needed = "\n".join(
        f"  {other.name}" + (f" or {other.instead}" if other.instead else "") + f": {GITHUB}/{other.url}"
        for other in SOURCES
    )
    raise DataError(
        f"{data / source.name}: no such file. Either DATA is a folder with these files:\n{needed}\nor, without DATA, "
        "they are downloaded from these addresses"
    )


def _download(source: Source, path: Path) -> Path:
    if not path.exists():
        address = f"{GITHUB}/{source.url}"
        say(f"downloading {source.name} ({source.license})")
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
                content = response.read()
        except (urllib.error.URLError, TimeoutError, OSError) as error:
            raise DataError(
                f"{address} can't be downloaded ({error}). Either try again with a connection, or download the files "
                "elsewhere and name their folder: DATA=FOLDER (a folder without them lists all names and addresses)"
            ) from None
        if hashlib.sha256(content).hexdigest() != source.sha256:
            raise DataError(f"{address}: the content has changed: its SHA-256 isn't {source.sha256}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_atomic(path) as file:
            file.write(content)
    return _checked(source, path)


def _checked(source: Source, path: Path) -> Path:
    if file_hash(path) != source.sha256:
        raise DataError(f"{path}: SHA-256 is {file_hash(path)}; expected {source.sha256}, as published; get it again")
    return path
