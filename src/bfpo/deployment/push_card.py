"""The model card of a repository: the card of the run, with licenses, base model and data as the hub reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import ModelCard

from bfpo.deployment.licenses import LICENSES, describe, normalize
from bfpo.errors import DataError

# Those of an earlier push would stay beside another license.
_LICENSE_KEYS = ("license", "license_name", "license_link")
_BEGIN, _END = "<!-- bfpo push: begin -->", "<!-- bfpo push: end -->"


@dataclass(frozen=True, slots=True)
class DataSource:
    """A set of training data.

    Args:
        name: Its name in `data_manifest.json`.
        hub_id: Its id on the hub; "" for files.
        license: Its license; "" if unknown.
    """

    name: str
    hub_id: str
    license: str


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card must say.

    Args:
        repo_id: The repository.
        license: License of the model.
        base: Hub id of the base model; "" for a model without one.
        base_license: License of the base model; "" for a model without one.
        is_adapter: Whether the model is an adapter of its base.
        sources: Sets of training data.
        label_sources: Where the safety labels of the data are from.
    """

    repo_id: str
    license: str
    base: str
    base_license: str
    is_adapter: bool
    sources: Sequence[DataSource]
    label_sources: Sequence[str]


def make_card(text: str, facts: CardFacts, *, local_name: str, evaluation: str | None) -> str:
    """Return a model card with its metadata, and a section about licenses in place of an earlier one.

    Args:
        text: The card that the run wrote; "" for none.
        facts: What the card must say.
        local_name: Folder that the run's card names as the model's path.
        evaluation: Section on an evaluation, between two markers; see `bfpo card`.

    Raises:
        DataError: If the metadata of the card isn't YAML, or the markers of a section aren't there once.
    """
    try:
        card = ModelCard(text or f"# {facts.repo_id.partition('/')[2] or facts.repo_id}\n")
    except (yaml.YAMLError, ValueError) as error:
        raise DataError(f"README.md: its metadata can't be read ({str(error).splitlines()[0]})") from None
    metadata = _metadata(facts)
    for key in _LICENSE_KEYS:
        setattr(card.data, key, metadata.pop(key, None))
    for key, value in metadata.items():
        setattr(card.data, key, value)
    content = str(card).replace(f'from_pretrained("{local_name}")', f'from_pretrained("{facts.repo_id}")')
    for section in (evaluation, _license_section(facts)):
        if section is not None:
            content = _put_section(content, section.strip())
    return content


def _metadata(facts: CardFacts) -> dict[str, Any]:
    metadata: dict[str, Any] = {"license": facts.license if facts.license in LICENSES else "other"}
    if facts.license not in LICENSES:
        metadata["license_name"] = facts.license
    if facts.base:
        metadata["base_model"] = facts.base
        metadata["base_model_relation"] = "adapter" if facts.is_adapter else "finetune"
    if hub_ids := sorted({source.hub_id for source in facts.sources if source.hub_id}):
        metadata["datasets"] = hub_ids
    return metadata


def _license_section(facts: CardFacts) -> str:
    rows = [(f"this {'adapter' if facts.is_adapter else 'model'}", facts.license)]
    if facts.base:
        rows.append((f"base model `{facts.base}`", facts.base_license))
    rows += [(f"data `{source.name}`", source.license) for source in facts.sources]
    lines = [_BEGIN, "## Licenses", "", "| | license | what it asks |", "|---|---|---|"]
    lines += [f"| {what} | {license} | {describe(license)} |" for what, license in rows]
    labels = ", ".join(facts.label_sources)
    if labels:
        lines += ["", f"Safety labels of the data by: {labels}."]
    credits = {
        license.credit: None for _, name in rows if (license := LICENSES.get(normalize(name))) and license.credit
    }
    lines += [line for credit in credits for line in ("", credit)]
    return "\n".join([*lines, _END])


def _put_section(text: str, section: str) -> str:
    """Return a text with a section, which begins and ends with a marker, in place of an earlier one."""
    lines = section.splitlines()
    begin, end = lines[0], lines[-1]
    counts = text.count(begin), text.count(end)
    if counts not in ((0, 0), (1, 1)) or text.find(begin) > text.find(end):
        raise DataError(f"README.md: expected '{begin}' and later '{end}' once each, or neither")
    if counts == (0, 0):
        return f"{text.rstrip()}\n\n{section}\n"
    before, _, rest = text.partition(begin)
    return f"{before}{section}{rest.partition(end)[2]}"


def read_sources(manifest: Mapping[str, Any]) -> tuple[list[DataSource], list[str]]:
    """Return the sets of training data in a `data_manifest.json`, and where their labels are from.

    Raises:
        DataError: If it isn't what training writes.
    """
    try:
        sources = [
            DataSource(
                str(source["name"]),
                "" if source["files"] else str(source["source"]["path"]),
                str(source.get("license") or ""),
            )
            for source in manifest.get("sources") or []
        ]
        labels = [str(label) for label in manifest.get("label_sources") or {} if label]
    except (KeyError, TypeError, AttributeError):
        raise DataError("data_manifest.json: not the JSON object that training writes") from None
    return sources, labels
